{{- define "espalier.release" -}}
{app.kubernetes.io/name: {{ .Chart.Name }}, app.kubernetes.io/instance: {{ .Release.Name }}}
{{- end }}

{{- define "espalier.ports" -}}
[{{ range $i, $port := . }}{{ if $i }}, {{ end }}{port: {{ $port }}, protocol: TCP}{{ end }}]
{{- end }}

{{/* The internet, without what is private: neither the cluster nor the node's metadata. */}}
{{- define "espalier.internet" -}}
- ipBlock:
    cidr: 0.0.0.0/0
    except:
      {{- toYaml .Values.networkPolicy.internetExcept | nindent 6 }}
{{- end }}

{{/* Pods of a component, of this and of other releases in the namespace. */}}
{{- define "espalier.peer" -}}
- podSelector:
    matchLabels: {app.kubernetes.io/part-of: espalier, app.kubernetes.io/component: {{ . }}}
{{- end }}

{{- define "espalier.policies.coordinator" -}}
{{- if .Values.coordinator.enabled }}
{{- $v := .Values.networkPolicy }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "espalier.metadata" (list . "coordinator") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "espalier.selector" (list . "coordinator") | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    - from:
        {{- range list "agent-worker" "infer-worker" "train-worker" }}
        {{- include "espalier.peer" . | nindent 8 }}
        {{- end }}
        {{- with $v.clients }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports: [{port: 7411, protocol: TCP}]
    {{- if .Values.keda.enabled }}
    # KEDA shows no token, and may ask for numbers only.
    - from:
        - namespaceSelector:
            matchLabels: {kubernetes.io/metadata.name: {{ .Values.keda.namespace }}}
      ports: [{port: 7412, protocol: TCP}]
    {{- end }}
  egress:
    - to:
        {{- if $v.redis.podLabels }}
        - podSelector:
            matchLabels:
              {{- toYaml $v.redis.podLabels | nindent 14 }}
        {{- else if $v.redis.to }}
        {{- toYaml $v.redis.to | nindent 8 }}
        {{- else }}
        - namespaceSelector: {}
        - ipBlock: {cidr: 0.0.0.0/0}
        {{- end }}
      ports: {{ include "espalier.ports" $v.redis.ports }}
    {{- if hasKey (default dict .Values.coordinator.config.scaler) "runpod" }}
    - to:
        {{- include "espalier.internet" . | nindent 8 }}
      ports: [{port: 443, protocol: TCP}]
    {{- end }}
{{- with $v.redis.podLabels }}
---
# Redis takes connections from coordinators, and from its own replicas and sentinels.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "espalier.metadata" (list $ "redis") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- toYaml . | nindent 6 }}
  policyTypes: [Ingress]
  ingress:
    - from:
        - podSelector:
            matchLabels:
              {{- include "espalier.selector" (list $ "coordinator") | nindent 14 }}
      ports: {{ include "espalier.ports" $v.redis.ports }}
    - from:
        - podSelector:
            matchLabels:
              {{- toYaml . | nindent 14 }}
{{- end }}
{{- end }}
{{- end }}

{{/* The way to the coordinators, wherever they are. */}}
{{- define "espalier.toCoordinators" -}}
{{- if .Values.coordinator.enabled -}}
- to:
    {{- include "espalier.peer" "coordinator" | nindent 4 }}
  ports: [{port: 7411, protocol: TCP}]
{{- else -}}
{{- $port := regexFind ":[0-9]+$" .Values.coordinatorUrl | trimPrefix ":" | default "443" | int -}}
- to: [{namespaceSelector: {}}, {ipBlock: {cidr: 0.0.0.0/0}}]
  ports: [{port: {{ $port }}, protocol: TCP}]
{{- end -}}
{{- end }}

{{- define "espalier.policies.workers" -}}
{{- $v := .Values.networkPolicy }}
{{- if .Values.agentWorker.enabled }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "espalier.metadata" (list . "agent-worker") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "espalier.selector" (list . "agent-worker") | nindent 6 }}
  policyTypes: [Ingress, Egress]
  egress:
    {{- include "espalier.toCoordinators" . | nindent 4 }}
    - to:
        {{- include "espalier.peer" "infer-worker" | nindent 8 }}
      ports: [{port: 8000, protocol: TCP}]
    - to:
        {{- include "espalier.internet" . | nindent 8 }}
      ports: [{port: 443, protocol: TCP}, {port: 80, protocol: TCP}]
    {{- with $v.agentEgress }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- if .Values.inferWorker.enabled }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "espalier.metadata" (list . "infer-worker") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "espalier.selector" (list . "infer-worker") | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    - from:
        {{- include "espalier.peer" "agent-worker" | nindent 8 }}
        {{- with $v.inferClients }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- if .Values.podMonitor.enabled }}
        - namespaceSelector:
            matchLabels: {kubernetes.io/metadata.name: {{ .Values.podMonitor.namespace }}}
        {{- end }}
      ports: [{port: 8000, protocol: TCP}]
  egress:
    {{- include "espalier.toCoordinators" . | nindent 4 }}
    - to:
        {{- include "espalier.internet" . | nindent 8 }}
      ports: [{port: 443, protocol: TCP}]
{{- end }}
{{- if .Values.trainWorker.enabled }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "espalier.metadata" (list . "train-worker") | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "espalier.selector" (list . "train-worker") | nindent 6 }}
  policyTypes: [Ingress, Egress]
  egress:
    {{- include "espalier.toCoordinators" . | nindent 4 }}
    - to:
        {{- include "espalier.internet" . | nindent 8 }}
      ports: [{port: 443, protocol: TCP}]
{{- end }}
{{- end }}
