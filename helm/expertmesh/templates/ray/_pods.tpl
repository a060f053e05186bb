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
{{- /* Each rank listens on its own port. KubeRay sets the next three only for a RayService: without them a dead
       head keeps Serve waiting. Large models load for longer than vLLM's own ten minutes. */}}
{{- $platform := dict
  "RAY_SERVE_ENABLE_DIRECT_INGRESS" "1"
  "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S" "1"
  "RAY_SERVE_KV_TIMEOUT_S" "5"
  "RAY_gcs_server_request_timeout_seconds" "5"
  "RAY_timeout_ms_task_wait_for_death_info" "0"
  "VLLM_ENGINE_READY_TIMEOUT_S" "3600" }}
{{- include "expertmesh.plainEnv" (mergeOverwrite $platform (deepCopy (.root.Values.ray.env | default dict)) (deepCopy (.pods.env | default dict))) }}
{{- end -}}

{{/* Everything of a pod's spec around its one container. */}}
{{- define "expertmesh.rayPod" -}}
enableServiceLinks: false
{{- with .pods.terminationGracePeriodSeconds }}
terminationGracePeriodSeconds: {{ . }}
{{- end }}
{{- with include "expertmesh.imagePullSecrets" .root }}
{{ . | trim }}
{{- end }}
{{- with include "expertmesh.placement" .pods }}
{{ . | trim }}
{{- end }}
{{- if or .pods.sharedMemory .pods.volumes }}
volumes:
  {{- with .pods.sharedMemory }}
  - name: dshm
    emptyDir: {medium: Memory, sizeLimit: {{ . }}}
  {{- end }}
  {{- with .pods.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "expertmesh.rayContainer" -}}
image: {{ include "expertmesh.image" (dict "root" .root "image" .root.Values.images.ray) }}
imagePullPolicy: {{ .root.Values.images.ray.pullPolicy }}
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
{{- if or .pods.sharedMemory .pods.volumeMounts }}
volumeMounts:
  {{- if .pods.sharedMemory }}
  - {name: dshm, mountPath: /dev/shm}
  {{- end }}
  {{- with .pods.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}
