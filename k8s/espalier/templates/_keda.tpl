{{/* How KEDA asks for the demand of a kind of jobs. Takes (list . kinds jobs-per-pod). */}}
{{- define "espalier.keda.trigger" -}}
{{- $root := index . 0 -}}
- type: external-push
  metadata:
    scalerAddress: {{ include "espalier.fullname" $root }}-coordinator-keda.{{ $root.Release.Namespace }}.svc:7412
    kinds: {{ index . 1 | quote }}
    jobsPerReplica: {{ index . 2 | quote }}
    {{- if $root.Values.tls.existingSecret }}
    enableTLS: "true"
  authenticationRef:
    name: {{ include "espalier.fullname" $root }}-coordinator
    {{- end }}
{{- end }}
