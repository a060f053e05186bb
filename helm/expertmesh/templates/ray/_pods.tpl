{{/* Environment of head and workers: secrets first, then plain variables, the group's own last. */}}
{{- define "expertmesh.rayEnv" -}}
{{- include "expertmesh.meshTokenEnv" .root }}
{{- with .root.Values.secrets.huggingFace }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .key }}
{{- end }}
{{- end }}
- name: VLLM_HOST_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- /* Each rank listens on its own port. KubeRay sets the next three only for a RayService: without them a dead
       head keeps Serve waiting. A node that has not reached the head for ten seconds ends itself, so that its
       group can start elsewhere. Large models load for longer than vLLM's own ten minutes. */}}
{{- $platform := dict
  "RAY_SERVE_ENABLE_DIRECT_INGRESS" "1"
  "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S" "1"
  "RAY_SERVE_KV_TIMEOUT_S" "5"
  "RAY_gcs_server_request_timeout_seconds" "5"
  "RAY_timeout_ms_task_wait_for_death_info" "0"
  "RAY_grpc_client_keepalive_timeout_ms" "10000"
  "RAY_gcs_rpc_server_reconnect_timeout_s" "10"
  "VLLM_ENGINE_READY_TIMEOUT_S" "3600"
  "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK" "0"
  "RAY_USAGE_STATS_ENABLED" "0"
  "VLLM_NO_USAGE_STATS" "1" }}
{{- if .withoutAccelerators }}
{{- /* A rank has one core, and compiling would keep the first request waiting. */}}
{{- $_ := set $platform "OMP_NUM_THREADS" "1" }}
{{- $_ := set $platform "TORCHDYNAMO_DISABLE" "1" }}
{{- $_ := set $platform "VLLM_CPU_OMP_THREADS_BIND" "nobind" }}
{{- end }}
{{- if .cache }}
{{- $_ := set $platform "HF_HUB_CACHE" (printf "%s/hub" .cache.mountPath) }}
{{- $_ := set $platform "VLLM_CACHE_ROOT" "/cache/vllm" }}
{{- end }}
{{- include "expertmesh.plainEnv" (mergeOverwrite $platform (deepCopy (.root.Values.ray.env | default dict)) (deepCopy (.pods.env | default dict))) }}
{{- end -}}

{{/* Ports of the agents: a raylet waits only seconds for those that they choose themselves. */}}
{{- define "expertmesh.rayStartParams" -}}
{{- $fixed := dict
  "metrics-export-port" "8080"
  "dashboard-agent-listen-port" "52365"
  "dashboard-agent-grpc-port" "52366"
  "runtime-env-agent-port" "52367" }}
{{- range $name, $value := mergeOverwrite $fixed (deepCopy (.rayStartParams | default dict)) }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Everything of a pod's spec around its one container. */}}
{{- define "expertmesh.rayPod" -}}
enableServiceLinks: false
{{- with .graceSeconds }}
terminationGracePeriodSeconds: {{ . }}
{{- end }}
{{- with include "expertmesh.imagePullSecrets" .root }}
{{ . | trim }}
{{- end }}
{{- with include "expertmesh.placement" .pods }}
{{ . | trim }}
{{- end }}
{{- with .pods.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pods.podSpec }}
{{ toYaml . }}
{{- end }}
{{- if or .pods.sharedMemory .pods.volumes .cache }}
volumes:
  {{- with .pods.sharedMemory }}
  - name: dshm
    emptyDir: {medium: Memory, sizeLimit: {{ . }}}
  {{- end }}
  {{- with .cache }}
  - name: model-cache
    {{- if eq .type "persistentVolumeClaim" }}
    persistentVolumeClaim: {claimName: {{ include "expertmesh.modelClaim" $.root }}}
    {{- else if eq .type "hostPath" }}
    hostPath: {path: {{ .hostPath }}, type: DirectoryOrCreate}
    {{- else if .sizeLimit }}
    emptyDir: {sizeLimit: {{ .sizeLimit }}}
    {{- else }}
    emptyDir: {}
    {{- end }}
  - name: compiled
    emptyDir: {}
  {{- end }}
  {{- with .pods.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "expertmesh.rayContainer" -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.images.ray) (deepCopy (.pods.image | default dict)) }}
image: {{ include "expertmesh.image" (dict "root" .root "image" $image) }}
imagePullPolicy: {{ $image.pullPolicy }}
env:
  {{- include "expertmesh.rayEnv" . | nindent 2 }}
lifecycle:
  preStop:
    exec: {command: [/bin/sh, -c, ray stop]}
{{- with .resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pods.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .pods.sharedMemory .pods.volumeMounts .cache }}
volumeMounts:
  {{- if .pods.sharedMemory }}
  - {name: dshm, mountPath: /dev/shm}
  {{- end }}
  {{- with .cache }}
  - {name: model-cache, mountPath: {{ .mountPath }}}
  - {name: compiled, mountPath: /cache}
  {{- end }}
  {{- with .pods.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}
