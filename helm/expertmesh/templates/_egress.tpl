{{/* Which parts of networkPolicy.egress gateways, controllers and Ray's pods need with these values. */}}
{{- define "expertmesh.egressNeeds" -}}
{{- $gateway := list -}}
{{- $controller := list "kubernetesApi" -}}
{{- $ray := list -}}
{{- if .Values.store.existingSecret -}}
  {{- $gateway = append $gateway "store" -}}
  {{- $controller = append $controller "store" -}}
{{- end -}}
{{- if eq (dig "limits" "store" "memory" .Values.platform.gateway) "redis" -}}
  {{- $gateway = append $gateway "redis" -}}
{{- end -}}
{{- if or .Values.monitoring.traces.endpoint (hasKey .Values.gateway.env "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") -}}
  {{- $gateway = append $gateway "traces" -}}
{{- end -}}
{{- if or .Values.monitoring.traces.endpoint (hasKey .Values.controller.env "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") -}}
  {{- $controller = append $controller "traces" -}}
{{- end -}}
{{- range .Values.platform.pools -}}
  {{- if eq .market "external" -}}{{- $gateway = append $gateway "internet" -}}{{- end -}}
{{- end -}}
{{- range .Values.models -}}
  {{- /* Else a folder. The controller reads a model's config.json, Ray's workers its weights. */}}
  {{- if not (regexMatch "^[./]" .model.source) -}}
    {{- $controller = append $controller "internet" -}}
    {{- $ray = append $ray "internet" -}}
  {{- end -}}
{{- end -}}
{{- range .Values.controller.spotNotices -}}
  {{- if ne . "kubernetes" -}}{{- $controller = append $controller "internet" -}}{{- end -}}
{{- end -}}
{{- dict "gateway" (uniq $gateway) "controller" (uniq $controller) "ray" (uniq $ray) | toYaml -}}
{{- end -}}

{{- define "expertmesh.egressRule" -}}
- ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with .to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "expertmesh.egressDns" -}}
- ports:
    {{- range $port := .ports }}
    {{- range $protocol := list "UDP" "TCP" }}
    - {protocol: {{ $protocol }}, port: {{ $port }}}
    {{- end }}
    {{- end }}
  {{- with .to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
