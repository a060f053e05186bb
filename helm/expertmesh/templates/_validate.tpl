{{/* What a JSON schema cannot say; the controller checks the same and more when it reads the manifests. */}}
{{- define "expertmesh.validate" -}}
{{- $pools := dict -}}
{{- range $index, $pool := .Values.platform.pools -}}
  {{- $where := printf "platform.pools.%d" $index -}}
  {{- if hasKey $pools $pool.name -}}
    {{- fail (printf "%s.name: %s: another pool has this name; give each its own" $where $pool.name) -}}
  {{- end -}}
  {{- $nodes := $pool.nodes | default dict -}}
  {{- $min := dig "min" 0 $nodes | int -}}
  {{- $max := dig "max" 1 $nodes | int -}}
  {{- if gt $min $max -}}
    {{- fail (printf "%s.nodes: min %d is above max %d; lower min or raise max" $where $min $max) -}}
  {{- end -}}
  {{- if eq $pool.market "external" -}}
    {{- range $key := list "usd_per_node_hour" "accelerator" "accelerators_per_node" "cpus_per_node" "nodes" -}}
      {{- if hasKey $pool $key -}}
        {{- fail (printf "%s.%s: an external pool has no nodes of ours and no price an hour; remove this key" $where $key) -}}
      {{- end -}}
    {{- end -}}
    {{- range $key := list "base_url" "key_variable" -}}
      {{- if not (get $pool $key) -}}
        {{- fail (printf "%s.%s: missing in an external pool; write it" $where $key) -}}
      {{- end -}}
    {{- end -}}
    {{- if not (hasKey $.Values.gateway.secretEnv $pool.key_variable) -}}
      {{- fail (printf "%s.key_variable: %s: no Secret gives it to the gateway; add it to gateway.secretEnv" $where $pool.key_variable) -}}
    {{- end -}}
  {{- else -}}
    {{- range $key := list "base_url" "key_variable" -}}
      {{- if get $pool $key -}}
        {{- fail (printf "%s.%s: is for pools with market: external; write that, or remove this key" $where $key) -}}
      {{- end -}}
    {{- end -}}
    {{- if not (hasKey $pool "usd_per_node_hour") -}}
      {{- fail (printf "%s.usd_per_node_hour: missing; write what a node of the pool costs an hour" $where) -}}
    {{- end -}}
  {{- end -}}
  {{- if and $pool.accelerator (not $pool.accelerators_per_node) -}}
    {{- fail (printf "%s.accelerators_per_node: missing beside accelerator %s; write how many a node has" $where $pool.accelerator) -}}
  {{- end -}}
  {{- $_ := set $pools $pool.name $pool -}}
{{- end -}}
{{- $known := keys $pools | sortAlpha | join ", " -}}
{{- $models := dict -}}
{{- range $index, $model := .Values.models -}}
  {{- $where := printf "models.%d" $index -}}
  {{- if hasKey $models $model.name -}}
    {{- fail (printf "%s.name: %s: another model has this name; rename one" $where $model.name) -}}
  {{- end -}}
  {{- $_ := set $models $model.name true -}}
  {{- range $place, $pool := $model.pools -}}
    {{- if not (hasKey $pools $pool) -}}
      {{- fail (printf "%s.pools.%d: %s: no such pool; platform.pools has %s" $where $place $pool $known) -}}
    {{- end -}}
    {{- if eq (get $pools $pool).market "external" -}}
      {{- fail (printf "%s.pools.%d: %s: is an external pool, which holds no groups; put it under external" $where $place $pool) -}}
    {{- end -}}
  {{- end -}}
  {{- range $place, $external := $model.external -}}
    {{- if not (hasKey $pools $external.pool) -}}
      {{- fail (printf "%s.external.%d.pool: %s: no such pool; platform.pools has %s" $where $place $external.pool $known) -}}
    {{- end -}}
    {{- if ne (get $pools $external.pool).market "external" -}}
      {{- fail (printf "%s.external.%d.pool: %s: is no external pool; put it under pools" $where $place $external.pool) -}}
    {{- end -}}
  {{- end -}}
  {{- include "expertmesh.validateGroups" (dict "index" $index "model" $model "pools" $pools) -}}
{{- end -}}
{{- range $index, $model := .Values.models -}}
  {{- range $place, $alias := $model.aliases -}}
    {{- if hasKey $models $alias -}}
      {{- fail (printf "models.%d.aliases.%d: %s: another model has this name, or it is written twice; rename one" $index $place $alias) -}}
    {{- end -}}
    {{- $_ := set $models $alias true -}}
  {{- end -}}
{{- end -}}
{{- $limits := .Values.platform.gateway.limits | default dict -}}
{{- if and (eq ($limits.store | default "memory") "redis") (not $limits.redis_url_variable) -}}
  {{- fail "platform.gateway.limits.redis_url_variable: missing with store: redis; name the variable that holds its URL" -}}
{{- end -}}
{{- with $limits.redis_url_variable -}}
  {{- if not (hasKey $.Values.gateway.secretEnv .) -}}
    {{- fail (printf "platform.gateway.limits.redis_url_variable: %s: no Secret gives it to the gateway; add it to gateway.secretEnv" .) -}}
  {{- end -}}
{{- end -}}
{{- range $pool, $_ := .Values.ray.workers -}}
  {{- if not (hasKey $pools $pool) -}}
    {{- fail (printf "ray.workers.%s: no such pool; platform.pools has %s" $pool $known) -}}
  {{- end -}}
{{- end -}}
{{- range $pool := .Values.platform.pools -}}
  {{- if ne $pool.market "external" -}}
    {{- $workers := mergeOverwrite (deepCopy $.Values.ray.workerDefaults) (deepCopy (index $.Values.ray.workers $pool.name | default dict)) -}}
    {{- include "expertmesh.validateRayPods" (dict "where" (ternary (printf "ray.workers.%s" $pool.name) "ray.workerDefaults" (hasKey $.Values.ray.workers $pool.name)) "pods" $workers "all" $.Values.ray.env "worker" true) -}}
    {{- if and (eq $pool.market "spot") (dig $pool.name "podDisruptionBudget" "enabled" false $.Values.ray.workers) -}}
      {{- fail (printf "ray.workers.%s.podDisruptionBudget: a spot node is taken whatever a budget says, which would only keep its pods from ending in order; remove it" $pool.name) -}}
    {{- end -}}
    {{- include "expertmesh.validateMarket" (dict "pool" $pool "workers" $workers "graceSeconds" (include "expertmesh.graceSeconds" (dict "root" $ "pool" $pool))) -}}
    {{- range $volume := $workers.volumes -}}
      {{- if has $volume.name (list "dshm" "model-cache" "compiled") -}}
        {{- fail (printf "ray.workers.%s.volumes: %s: the chart has a volume of this name; rename yours" $pool.name $volume.name) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- include "expertmesh.validateRayPods" (dict "where" "ray.head" "pods" .Values.ray.head "all" .Values.ray.env "worker" false) -}}
{{- $ports := dict "8265" "Ray's dashboard" -}}
{{- range $service := list "gateway" "controller" -}}
  {{- $port := (index $.Values.platform $service).port | toString -}}
  {{- with get $ports $port -}}
    {{- fail (printf "platform.%s.port: %s: is that of %s; choose another one" $service $port .) -}}
  {{- end -}}
  {{- $_ := set $ports $port (printf "the %s" $service) -}}
{{- end -}}
{{- $scaling := .Values.gateway.autoscaling -}}
{{- if $scaling.enabled -}}
  {{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
    {{- fail (printf "gateway.autoscaling: minReplicas %d is above maxReplicas %d; lower minReplicas or raise maxReplicas" (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
  {{- end -}}
  {{- if not (or $scaling.queuedRequests $scaling.openRequests $scaling.cpuPercent) -}}
    {{- fail "gateway.autoscaling: nothing to scale by; set queuedRequests, openRequests or cpuPercent above 0" -}}
  {{- end -}}
  {{- if and $scaling.cpuPercent (not (dig "requests" "cpu" "" .Values.gateway.resources)) -}}
    {{- fail "gateway.autoscaling.cpuPercent: is a share of gateway.resources.requests.cpu, which is missing; set it" -}}
  {{- end -}}
{{- end -}}
{{- range $service := list "gateway" "controller" -}}
  {{- range $volume := (index $.Values $service).volumes -}}
    {{- if has $volume.name (list "manifest" "manifests" "journal" "state" "tmp") -}}
      {{- fail (printf "%s.volumes: %s: the chart has a volume of this name; rename yours" $service $volume.name) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- with .Values.gateway.terminationGracePeriodSeconds -}}
  {{- $drain := $.Values.gateway.drain -}}
  {{- $needed := include "expertmesh.gatewayStopSeconds" $ | int -}}
  {{- if lt (int .) $needed -}}
    {{- fail (printf "gateway.terminationGracePeriodSeconds: %d s would cut streams: gateway.drain takes %d s and %d s, the ledger 15 s; leave it out, or write at least %d" (int .) (int $drain.delaySeconds) (int $drain.timeoutSeconds) $needed) -}}
  {{- end -}}
{{- end -}}
{{- if hasKey .Values.controller.env "OTEL_EXPORTER_OTLP_ENDPOINT" -}}
  {{- fail "controller.env.OTEL_EXPORTER_OTLP_ENDPOINT: the chart sets this variable; remove it and write monitoring.traces.endpoint" -}}
{{- end -}}
{{- range $name, $instead := dict "OTEL_EXPORTER_OTLP_ENDPOINT" "endpoint" "OTEL_TRACES_SAMPLER" "ratio" "OTEL_TRACES_SAMPLER_ARG" "ratio" -}}
  {{- if or (hasKey $.Values.gateway.env $name) (hasKey $.Values.gateway.secretEnv $name) -}}
    {{- fail (printf "gateway.env.%s: the chart sets this variable; remove it and write monitoring.traces.%s" $name $instead) -}}
  {{- end -}}
{{- end -}}
{{- if and .Values.gateway.ingress.enabled (not .Values.gateway.ingress.hosts) -}}
  {{- fail "gateway.ingress.hosts: missing; write at least one, e.g. [{host: llm.example.com, path: /}]" -}}
{{- end -}}
{{- if and .Values.gateway.httpRoute.enabled (not .Values.gateway.httpRoute.parentRefs) -}}
  {{- fail "gateway.httpRoute.parentRefs: missing; name the Gateway, e.g. [{name: public, namespace: gateways}]" -}}
{{- end -}}
{{- $cluster := include "expertmesh.rayCluster" . -}}
{{- if gt (len $cluster) 50 -}}
  {{- fail (printf "nameOverride: the RayCluster would be called %s, %d characters of at most 50; shorten nameOverride" $cluster (len $cluster)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" $cluster) -}}
  {{- fail (printf "nameOverride: the RayCluster would be called %s, and KubeRay wants a letter first; set nameOverride" $cluster) -}}
{{- end -}}
{{- if and .Values.ray.redis.existingSecret (not .Values.ray.redis.address) -}}
  {{- fail "ray.redis.address: missing beside ray.redis.existingSecret; write host:port" -}}
{{- end -}}
{{- with .Values.tests.chat.model -}}
  {{- if not (hasKey $models .) -}}
    {{- fail (printf "tests.chat.model: %s: no such model; models has %s" . (keys $models | sortAlpha | join ", ")) -}}
  {{- end -}}
{{- end -}}
{{- if .Values.platform.store_url -}}
  {{- fail "platform.store_url: the chart would put it into a ConfigMap; put the URL into a Secret and name it in store.existingSecret" -}}
{{- end -}}
{{- if ne (.Values.platform.ray_dashboard_port | default 8265 | int) 8265 -}}
  {{- fail (printf "platform.ray_dashboard_port: %v: KubeRay's head listens on 8265; remove the key" .Values.platform.ray_dashboard_port) -}}
{{- end -}}
{{- range $name := list "mesh" "ray" -}}
  {{- $secret := index $.Values.secrets $name -}}
  {{- if not (or $secret.existingSecret $secret.value) -}}
    {{- fail (printf "secrets.%s: neither existingSecret nor value is set; name a Secret that holds the token, or give one for a trial" $name) -}}
  {{- end -}}
{{- end -}}
{{- $reserved := list "EXPERTMESH_MESH_TOKEN" "EXPERTMESH_STORE_URL" "HF_TOKEN" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_SERVE_ENABLE_DIRECT_INGRESS" "RAY_enable_autoscaler_v2" -}}
{{- range $name, $_ := .Values.gateway.secretEnv -}}
  {{- if hasKey $.Values.gateway.env $name -}}
    {{- fail (printf "gateway.env.%s: is in gateway.secretEnv too; remove one" $name) -}}
  {{- end -}}
{{- end -}}
{{- $envs := dict "gateway.secretEnv" .Values.gateway.secretEnv "gateway.env" .Values.gateway.env "controller.env" .Values.controller.env "ray.env" .Values.ray.env "ray.head.env" .Values.ray.head.env "ray.workerDefaults.env" .Values.ray.workerDefaults.env -}}
{{- range $pool, $workers := .Values.ray.workers -}}
  {{- $_ := set $envs (printf "ray.workers.%s.env" $pool) $workers.env -}}
{{- end -}}
{{- range $where, $env := $envs -}}
  {{- range $name, $_ := $env -}}
    {{- if has $name $reserved -}}
      {{- fail (printf "%s.%s: the chart sets this variable; remove it (secrets come from `secrets` and `store`)" $where $name) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}
