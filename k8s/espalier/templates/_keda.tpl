{{/* How KEDA asks for the demand of a kind of jobs. Takes (list . type kinds jobs-per-pod); of a ScaledJob KEDA takes no pushes. */}}
{{- define "espalier.keda.trigger" -}}
{{- $root := index . 0 -}}
- type: {{ index . 1 }}
  metadata:
    scalerAddress: {{ include "espalier.fullname" $root }}-coordinator-keda.{{ $root.Release.Namespace }}.svc:7412
    kinds: {{ index . 2 | quote }}
    jobsPerReplica: {{ index . 3 | quote }}
    {{- if $root.Values.tls.existingSecret }}
    enableTLS: "true"
  authenticationRef:
    name: {{ include "espalier.fullname" $root }}-coordinator
    {{- end }}
{{- end }}
