{{/* Whether the groups that a model gives fit the nodes of its pools. What `parallelism: auto` comes to, and whether
     the model's experts can be shared so, the controller tells: it knows the model. */}}
{{- define "expertmesh.validateGroups" -}}
{{- $where := printf "models.%d" .index -}}
{{- $model := .model -}}
{{- $bounds := dig "scaling" "groups" dict $model -}}
{{- $min := dig "min" 0 $bounds | int -}}
{{- $max := dig "max" 1 $bounds | int -}}
{{- if gt $min $max -}}
  {{- fail (printf "%s.scaling.groups: min %d is above max %d; lower min or raise max" $where $min $max) -}}
{{- end -}}
{{- $parallelism := $model.parallelism | default "auto" -}}
{{- $sizes := list -}}
{{- if kindIs "map" $parallelism -}}
  {{- $sizes = list $parallelism -}}
{{- else if kindIs "slice" $parallelism -}}
  {{- $sizes = $parallelism -}}
{{- end -}}
{{- range $at, $size := $sizes -}}
  {{- $here := ternary (printf "%s.parallelism" $where) (printf "%s.parallelism.%d" $where $at) (kindIs "map" $parallelism) -}}
  {{- $tensor := $size.tensor | default 1 | int -}}
  {{- $expert := $size.expert | int -}}
  {{- $redundant := $size.redundant_experts | default 0 | int -}}
  {{- if and (gt $expert 1) (ne (mod $expert $tensor) 0) -}}
    {{- fail (printf "%s.expert: %d is no multiple of tensor %d; a rank needs `tensor` workers, so write a multiple" $here $expert $tensor) -}}
  {{- end -}}
  {{- $data := $size.data | default 1 | int -}}
  {{- if gt $expert 1 -}}
    {{- $data = div $expert $tensor | int -}}
    {{- if and $size.data (ne (int $size.data) $data) -}}
      {{- fail (printf "%s.data: %d is not expert %d / tensor %d; leave data out" $here (int $size.data) $expert $tensor) -}}
    {{- end -}}
  {{- else if $redundant -}}
    {{- fail (printf "%s.redundant_experts: %d needs expert above 1; remove it" $here $redundant) -}}
  {{- end -}}
  {{- range $key := list "num_experts" "n_routed_experts" "num_local_experts" -}}
    {{- with dig "shape" $key 0 $model.model | int -}}
      {{- if mod (add . $redundant) $expert -}}
        {{- fail (printf "%s.redundant_experts: %d experts and %d copies cannot be shared evenly by expert %d; write redundant_experts: %d" $here . $redundant $expert (sub $expert (mod . $expert))) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
  {{- $workers := mul $tensor $data | int -}}
  {{- range $name := $model.pools -}}
    {{- $pool := get $.pools $name -}}
    {{- $most := dig "nodes" "max" 1 $pool | int -}}
    {{- $slots := $pool.cpus_per_node | default 1 | int -}}
    {{- $what := "CPUs" -}}
    {{- if $pool.accelerators_per_node -}}
      {{- $slots = int $pool.accelerators_per_node -}}
      {{- $what = "accelerators" -}}
      {{- if mod $slots $tensor -}}
        {{- fail (printf "%s.tensor: %d does not divide the %d accelerators of a node of pool %s; write a divisor, or leave the pool out of %s.pools" $here $tensor $slots $name $where) -}}
      {{- end -}}
      {{- if and (gt $workers $slots) (mod $workers $slots) -}}
        {{- fail (printf "%s: a group of %d workers leaves part of a node of pool %s idle, which has %d accelerators; write a multiple of %d, or leave the pool out of %s.pools" $here $workers $name $slots $slots $where) -}}
      {{- end -}}
    {{- end -}}
    {{- if gt $workers (mul $slots $most | int) -}}
      {{- fail (printf "%s: a group of %d workers never fits pool %s, which has at most %d nodes of %d %s; raise nodes.max, or leave the pool out of %s.pools" $here $workers $name $most $slots $what $where) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* A group runs in one pool, so a pool must not mix on-demand and spot nodes. */}}
{{- define "expertmesh.validateMarket" -}}
{{- $where := printf "ray.workers.%s" .pool.name -}}
{{- $selector := .workers.nodeSelector | default dict -}}
{{- $says := "" -}}
{{- range $label := list "karpenter.sh/capacity-type" "eks.amazonaws.com/capacityType" "kubernetes.azure.com/scalesetpriority" "cloud.google.com/gke-provisioning" -}}
  {{- with get $selector $label -}}
    {{- $says = ternary "spot" "on-demand" (has (lower .) (list "spot" "preemptible")) -}}
  {{- end -}}
{{- end -}}
{{- range $label := list "cloud.google.com/gke-spot" "cloud.google.com/gke-preemptible" -}}
  {{- with get $selector $label -}}
    {{- $says = ternary "spot" "on-demand" (eq . "true") -}}
  {{- end -}}
{{- end -}}
{{- if and $says (has .pool.market (list "spot" "on-demand")) (ne $says .pool.market) -}}
  {{- fail (printf "%s.nodeSelector: selects %s nodes for pool %s with market: %s; make a pool for each market, and set nodeSelector under ray.workers.<pool>" $where $says .pool.name .pool.market) -}}
{{- end -}}
{{- if and (eq .pool.market "spot") (gt (int .graceSeconds) 120) -}}
  {{- fail (printf "%s: a grace period of %d s outlasts a spot node, which is gone 30 to 120 s after its notice; write terminationGracePeriodSeconds: 25" $where (int .graceSeconds)) -}}
{{- end -}}
{{- end -}}

{{/* What KubeRay refuses in an existing cluster only, with an event (ray-operator's validation.go). */}}
{{- define "expertmesh.validateRayPods" -}}
{{- $where := .where -}}
{{- $instead := dict
  "labels" "nodes have those of their pool"
  "redis-password" "write ray.redis"
  "redis-username" "write ray.redis" -}}
{{- if .worker -}}
  {{- range $name := list "num-cpus" "num-gpus" "memory" "resources" -}}
    {{- $_ := set $instead $name "what a node has comes from its pool in platform.pools" -}}
  {{- end -}}
{{- end -}}
{{- range $name, $hint := $instead -}}
  {{- if hasKey ($.pods.rayStartParams | default dict) $name -}}
    {{- fail (printf "%s.rayStartParams.%s: KubeRay refuses it; remove it: %s" $where $name $hint) -}}
  {{- end -}}
{{- end -}}
{{- range $name := list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" -}}
  {{- if or (hasKey ($.pods.env | default dict) $name) (hasKey $.all $name) -}}
    {{- fail (printf "%s.env.%s: KubeRay refuses it; remove it and write ray.redis" (ternary "ray" $where (hasKey $.all $name)) $name) -}}
  {{- end -}}
{{- end -}}
{{- end -}}
