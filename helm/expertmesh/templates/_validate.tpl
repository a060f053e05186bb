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
  {{- end -}}
{{- end -}}
{{- range $pool, $_ := .Values.ray.workers -}}
  {{- if not (hasKey $pools $pool) -}}
    {{- fail (printf "ray.workers.%s: no such pool; platform.pools has %s" $pool $known) -}}
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
{{- $reserved := list "EXPERTMESH_MESH_TOKEN" "EXPERTMESH_STORE_URL" "HF_TOKEN" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_SERVE_ENABLE_DIRECT_INGRESS" -}}
{{- $envs := dict "gateway.env" .Values.gateway.env "controller.env" .Values.controller.env "ray.env" .Values.ray.env "ray.head.env" .Values.ray.head.env "ray.workerDefaults.env" .Values.ray.workerDefaults.env -}}
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
