{{- define "anteroom.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 53 characters, so that the longest suffix fits into a DNS label. */}}
{{- define "anteroom.fullname" -}}
{{- $name := include "anteroom.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "anteroom.selector" -}}
app.kubernetes.io/name: {{ include "anteroom.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "anteroom.labels" -}}
{{ include "anteroom.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "anteroom.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "anteroom.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* DNS name of one of the chart's Services: (list . "peers") */}}
{{- define "anteroom.serviceHost" -}}
{{- $root := index . 0 -}}
{{- printf "%s-%s.%s.svc.%s" (include "anteroom.fullname" $root) (index . 1) $root.Release.Namespace $root.Values.clusterDomain -}}
{{- end -}}

{{- define "anteroom.peersSecret" -}}
{{- default (printf "%s-peers" (include "anteroom.fullname" .)) .Values.peers.existingSecret -}}
{{- end -}}

{{- define "anteroom.scalerAddress" -}}
{{- default (printf "%s:9090" (include "anteroom.serviceHost" (list . "scaler"))) .Values.scaler.address -}}
{{- end -}}

{{- define "anteroom.gracePeriod" -}}
{{- with .Values.drain -}}
{{- add (int .preStopSeconds) (int .delaySeconds) (int .timeoutSeconds) 10 -}}
{{- end -}}
{{- end -}}

{{/* Settings that are read only at startup. */}}
{{- define "anteroom.fixedConfig" -}}
listen: {{ printf "%s:8080" .Values.listenHost | quote }}
admin: {{ printf "%s:8081" .Values.listenHost | quote }}
workers: {{ .Values.workers }}
log: {{ .Values.log }}
drainDelay: {{ printf "%ds" (int .Values.drain.delaySeconds) }}
drainTimeout: {{ printf "%ds" (int .Values.drain.timeoutSeconds) }}
scaler: {{ printf "%s:9090" .Values.listenHost | quote }}
{{- with .Values.scaler.tls }}
{{- if .secretName }}
scalerTls:
  cert: /etc/anteroom-tls/tls.crt
  key: /etc/anteroom-tls/tls.key
  {{- if .clientAuth }}
  clientCa: /etc/anteroom-tls/ca.crt
  {{- end }}
{{- end }}
{{- end }}
peers:
  listen: {{ printf "%s:9091" .Values.listenHost | quote }}
  service: {{ printf "%s:9091" (include "anteroom.serviceHost" (list . "peers")) | quote }}
  tokenFile: /etc/anteroom-peers/token
  timeout: {{ .Values.peers.timeout }}
  unreachableTimeout: {{ .Values.peers.unreachableTimeout }}
kubernetes:
  namespaces: {{ toJson .Values.kubernetes.namespaces }}
  modelRoutes: {{ .Values.kubernetes.modelRoutes }}
  interceptorRoutes: {{ .Values.kubernetes.interceptorRoutes }}
  allowedHosts: {{ include "anteroom.allowedHosts" . }}
  podLogs: {{ .Values.report.podLogs }}
  sessions: {{ .Values.sessions.enabled }}
{{- with .Values.traces }}
{{- if .endpoint }}
traces:
  endpoint: {{ .endpoint | quote }}
  protocol: {{ .protocol }}
  sampleRatio: {{ .sampleRatio }}
  headers: {{ toJson .headers }}
  serviceName: {{ .serviceName | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* allowedHosts, plus the names of Anteroom's Services that look like Internet names (NAME.NAMESPACE). */}}
{{- define "anteroom.hosts" -}}
{{- $name := printf "%s.%s" (include "anteroom.fullname" .) .Release.Namespace -}}
{{- $admin := printf "%s-admin.%s" (include "anteroom.fullname" .) .Release.Namespace -}}
{{- toJson (concat .Values.allowedHosts (list $name $admin)) -}}
{{- end -}}

{{/* kubernetes.allowedHosts, plus the gateways of the models: both are set by the same person. */}}
{{- define "anteroom.allowedHosts" -}}
{{- $hosts := .Values.kubernetes.allowedHosts -}}
{{- range .Values.models -}}
{{- with .gateway -}}
{{- $hosts = append $hosts (urlParse .).hostname -}}
{{- end -}}
{{- end -}}
{{- toJson (uniq $hosts) -}}
{{- end -}}

{{/* Minimum number of replicas in a profile. */}}
{{- define "anteroom.floor" -}}
{{- get (dict "ha" 2 "dev" 1 "cost" 0) . -}}
{{- end -}}

{{/* Selector of one model in vLLM's metrics: (list root model) */}}
{{- define "anteroom.modelSelector" -}}
{{- $model := index . 1 -}}
{{- $served := first (default (list $model.name) $model.models) -}}
{{- printf "{namespace=%q,model_name=%q}" (default (index . 0).Release.Namespace $model.namespace) $served -}}
{{- end -}}

{{/* "true" if an object of the Prometheus operator is rendered, by its `enabled`: (list root enabled); else empty. */}}
{{- define "anteroom.monitored" -}}
{{- $root := index . 0 -}}
{{- $enabled := toString (index . 1) -}}
{{- $installed := $root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1" -}}
{{- if or (eq $enabled "true") (and (eq $enabled "auto") $installed) -}}
true
{{- end -}}
{{- end -}}
