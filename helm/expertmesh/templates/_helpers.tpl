{{/* First part of all names; 40 characters leave room for the suffixes and for KubeRay's own. */}}
{{- define "expertmesh.fullname" -}}
{{- if .Values.nameOverride -}}
{{- .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* KubeRay makes a ServiceAccount, a Role and a RoleBinding of this name, so nothing of ours may have it. */}}
{{- define "expertmesh.rayCluster" -}}
{{- include "expertmesh.fullname" . }}-ray
{{- end -}}

{{- define "expertmesh.selectorLabels" -}}
app.kubernetes.io/name: expertmesh
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "expertmesh.labels" -}}
{{ include "expertmesh.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* Of .image, with the chart's appVersion as the tag when neither tag nor digest is given. */}}
{{- define "expertmesh.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "expertmesh.meshSecret" -}}
{{- .Values.secrets.mesh.existingSecret | default (printf "%s-mesh-token" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.raySecret" -}}
{{- .Values.secrets.ray.existingSecret | default (printf "%s-ray-token" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.storeClaim" -}}
{{- include "expertmesh.fullname" . }}-store
{{- end -}}

{{- define "expertmesh.controllerUrl" -}}
http://{{ include "expertmesh.fullname" . }}-controller:{{ .Values.platform.controller.port }}
{{- end -}}

{{- define "expertmesh.dashboardUrl" -}}
http://{{ include "expertmesh.rayCluster" . }}-head-svc:8265
{{- end -}}

{{- define "expertmesh.meshTokenEnv" -}}
- name: EXPERTMESH_MESH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "expertmesh.meshSecret" . }}
      key: {{ .Values.secrets.mesh.key }}
{{- end -}}

{{/* Tokens that the chart itself makes Secrets of roll the pods that read them. */}}
{{- define "expertmesh.secretsChecksum" -}}
{{- with .Values.secrets -}}
{{- if or .mesh.value .ray.value -}}
checksum/secrets: {{ list .mesh.value .ray.value | toJson | sha256sum }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.storeEnv" -}}
- name: EXPERTMESH_STORE_URL
  {{- if .Values.store.existingSecret }}
  valueFrom:
    secretKeyRef:
      name: {{ .Values.store.existingSecret }}
      key: {{ .Values.store.key }}
  {{- else }}
  value: sqlite+aiosqlite:////var/lib/expertmesh/store.db
  {{- end }}
{{- end -}}

{{/* The state folder: the shared volume of the SQLite store, else scratch space. */}}
{{- define "expertmesh.stateVolume" -}}
- name: state
  {{- if .Values.store.existingSecret }}
  emptyDir: {}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ include "expertmesh.storeClaim" . }}
  {{- end }}
{{- end -}}

{{/* What a gateway needs to stop: both times of its drain, and 15 s for the last write to the ledger. */}}
{{- define "expertmesh.gatewayStopSeconds" -}}
{{- add .Values.gateway.drain.delaySeconds .Values.gateway.drain.timeoutSeconds 15 -}}
{{- end -}}

{{- define "expertmesh.tracesEndpointEnv" -}}
{{- with .Values.monitoring.traces.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Of gateways; the controller sends all of its few decisions. */}}
{{- define "expertmesh.tracesEnv" -}}
{{- $traces := .Values.monitoring.traces -}}
{{- include "expertmesh.tracesEndpointEnv" . }}
{{- if or $traces.endpoint (hasKey .Values.gateway.env "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") }}
- name: OTEL_TRACES_SAMPLER
  value: parentbased_traceidratio
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ $traces.ratio | toString | quote }}
{{- end }}
{{- end -}}

{{- define "expertmesh.gatewayKind" -}}
{{- ternary "StatefulSet" "Deployment" .Values.gateway.journal.persistent -}}
{{- end -}}

{{- define "expertmesh.secretEnv" -}}
{{- range $name, $secret := . }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret.name }}
      key: {{ $secret.key }}
{{- end }}
{{- end -}}

{{- define "expertmesh.plainEnv" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- define "expertmesh.imagePullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "expertmesh.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* On other nodes than pods of the same kind, as far as there are any. */}}
{{- define "expertmesh.spread" -}}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "expertmesh.selectorLabels" $ | nindent 8 }}
  {{- end }}
{{- end -}}

{{/* Placement of gateways and controllers: .pods with an affinity that SQLite asks for. Its file is on a volume of
     one node, and several hosts cannot share its WAL. */}}
{{- define "expertmesh.servicePlacement" -}}
{{- $placement := pick .pods "nodeSelector" "tolerations" "affinity" | deepCopy -}}
{{- if not .root.Values.store.existingSecret -}}
{{- $selector := include "expertmesh.selectorLabels" (dict "root" .root "component" "controller") | fromYaml -}}
{{- $near := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $selector) -}}
{{- $_ := set $placement "affinity" (merge (dict "podAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $near))) ($placement.affinity | default dict)) -}}
{{- end -}}
{{- include "expertmesh.placement" $placement -}}
{{- end -}}

{{/* Of the workers of a pool: a spot node is gone before a default of minutes is over. */}}
{{- define "expertmesh.graceSeconds" -}}
{{- $defaults := .root.Values.ray.workerDefaults -}}
{{- $own := index .root.Values.ray.workers .pool.name | default dict -}}
{{- $usual := ternary $defaults.spotTerminationGracePeriodSeconds $defaults.terminationGracePeriodSeconds (eq .pool.market "spot") -}}
{{- $given := "" -}}
{{- if eq .pool.market "spot" -}}{{- $given = $own.spotTerminationGracePeriodSeconds -}}{{- end -}}
{{- $own.terminationGracePeriodSeconds | default $given | default $usual -}}
{{- end -}}

{{- define "expertmesh.modelClaim" -}}
{{- .Values.modelCache.claim.existingClaim | default (printf "%s-models" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{/* Both kinds of Ray pods, for label selectors. */}}
{{- define "expertmesh.rayPodsSelector" -}}
matchLabels:
  app.kubernetes.io/name: expertmesh
  app.kubernetes.io/instance: {{ .Release.Name }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [ray-head, ray-worker]}
{{- end -}}

{{- define "expertmesh.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "expertmesh.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
