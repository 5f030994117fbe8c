{{/* The name that all objects of the release begin with. */}}
{{- define "espalier.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* What tells the pods of a component apart; it can never change. Takes (list . component). */}}
{{- define "espalier.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Of pods: without what changes with each version of the chart, which would start them all anew. */}}
{{- define "espalier.podLabels" -}}
{{ include "espalier.selector" . }}
app.kubernetes.io/part-of: espalier
{{- end }}

{{/* Of objects. Takes (list . component). */}}
{{- define "espalier.labels" -}}
{{- $root := index . 0 -}}
{{ include "espalier.podLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* Takes (list . component). */}}
{{- define "espalier.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "espalier.fullname" $root }}-{{ index . 1 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "espalier.labels" . | nindent 2 }}
{{- end }}

{{/* Takes (list . component digest). */}}
{{- define "espalier.image" -}}
{{- $root := index . 0 -}}
{{- $name := printf "%s/%s" $root.Values.image.repository (index . 1) -}}
{{- with index . 2 -}}
{{- printf "%s@%s" $name . -}}
{{- else -}}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $root.Values.image.tag) -}}
{{- end -}}
{{- end }}

{{/* What the pods of all components have in common. Takes (list . component values). */}}
{{- define "espalier.pod" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := index . 2 -}}
serviceAccountName: {{ include "espalier.fullname" $root }}-{{ $component }}
automountServiceAccountToken: false
# The variables of Kubernetes for a Service espalier-coordinator begin like those of the configuration, where unknown keys
# are refused.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    {{- toYaml (default (dict "type" "RuntimeDefault") $values.seccompProfile) | nindent 4 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What the containers of all components have in common. Takes (list . component values). */}}
{{- define "espalier.container" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
name: {{ index . 1 }}
image: {{ include "espalier.image" (list $root (index . 1) $values.digest) }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* The resources of a container, with its GPU. Takes the values of the component. */}}
{{- define "espalier.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpu -}}
{{- $resources = mergeOverwrite $resources (dict "limits" (dict .gpuResource 1)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{/* One variable out of a Secret. Takes (list variable secret key). */}}
{{- define "espalier.secretEnv" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef:
      name: {{ index . 1 }}
      key: {{ index . 2 }}
{{- end }}

{{/* Variables that every process reads. */}}
{{- define "espalier.env" -}}
- name: HOME
  value: /tmp
{{- with .Values.telemetry.logFilter }}
- name: ESPALIER_LOG
  value: {{ . | quote }}
{{- end }}
{{- with .Values.telemetry.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
- name: AWS_REGION
  value: {{ .Values.store.region | quote }}
{{- with .Values.store.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.store.existingSecret }}
{{ include "espalier.secretEnv" (list "AWS_ACCESS_KEY_ID" . "AWS_ACCESS_KEY_ID") }}
{{ include "espalier.secretEnv" (list "AWS_SECRET_ACCESS_KEY" . "AWS_SECRET_ACCESS_KEY") }}
{{ include "espalier.secretEnv" (list "AWS_SESSION_TOKEN" . "AWS_SESSION_TOKEN") }}
      optional: true
{{- end }}
{{- end }}

{{- define "espalier.hubEnv" -}}
{{- with .Values.hub.existingSecret }}
{{ include "espalier.secretEnv" (list "HF_TOKEN" . $.Values.hub.key) }}
{{- end }}
{{- end }}

{{/* Where workers find coordinators: a name that stands for all of them, so that streams spread. */}}
{{- define "espalier.coordinatorUrl" -}}
{{- if .Values.coordinator.enabled -}}
{{ ternary "https" "http" (not (empty .Values.tls.existingSecret)) }}://{{ include "espalier.fullname" . }}-coordinator-pods.{{ .Release.Namespace }}.svc:7411
{{- else -}}
{{ .Values.coordinatorUrl }}
{{- end -}}
{{- end }}

{{/* The authority that workers trust, as a volume and as its mount. */}}
{{- define "espalier.caVolume" -}}
{{- with .Values.tls.existingSecret }}
- name: ca
  secret:
    secretName: {{ . }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end }}

{{- define "espalier.caMount" -}}
{{- if .Values.tls.existingSecret }}
- {name: ca, mountPath: /etc/espalier/ca, readOnly: true}
{{- end }}
{{- end }}

{{/* Where models are kept. Takes the values of the component. */}}
{{- define "espalier.modelCache" -}}
- name: models
{{- if .modelCache.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .modelCache.existingClaim }}
{{- else if .modelCache.storageClassName }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ .modelCache.storageClassName }}
        resources:
          requests:
            storage: {{ .modelCache.size }}
{{- else }}
  emptyDir:
    sizeLimit: {{ .modelCache.size }}
{{- end }}
{{- end }}

{{/* A value as TOML. Numbers of values are floats, and those that are whole have to be written as integers. */}}
{{- define "espalier.toml.value" -}}
{{- if kindIs "map" . -}}
{ {{- range $i, $key := keys . | sortAlpha }}{{ if $i }},{{ end }} {{ toJson $key }} = {{ include "espalier.toml.value" (index $ $key) }}{{ end }} }
{{- else if kindIs "slice" . -}}
[{{- range $i, $item := . }}{{ if $i }}, {{ end }}{{ include "espalier.toml.value" $item }}{{ end -}}]
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else if kindIs "invalid" . -}}
{{- fail "a value in `config` is null: give it a value, or leave the key out" -}}
{{- else -}}
{{- toJson . -}}
{{- end -}}
{{- end }}

{{/* A whole file of TOML. */}}
{{- define "espalier.toml" -}}
{{- range $key := keys . | sortAlpha -}}
{{ $key }} = {{ include "espalier.toml.value" (index $ $key) }}
{{ end -}}
{{- end }}

{{/* Port and probes of a worker that serves its health. A training or a browser may keep a machine busy for a while. */}}
{{- define "espalier.healthProbes" -}}
ports:
  - {name: health, containerPort: 7414}
startupProbe:
  httpGet: {path: /health, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
# Nobody is sent to a worker by it: it says in `kubectl get pods` whether the worker has its coordinators.
readinessProbe:
  httpGet: {path: /ready, port: health}
  periodSeconds: 10
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /health, port: health}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{/* Asks a coordinator with TLS whether a service is served. */}}
{{- define "espalier.coordinatorProbe" -}}
exec:
  command: [espalier-coordinator, health, --config=/etc/espalier/coordinator.toml, --service={{ . }}]
timeoutSeconds: 5
{{- end }}
