{{/* The pod of a train worker. Takes (list . once): whether it ends with its job. */}}
{{- define "espalier.train.template" -}}
{{- $root := index . 0 -}}
{{- $once := index . 1 -}}
{{- $v := $root.Values.trainWorker -}}
metadata:
  labels:
    {{- include "espalier.podLabels" (list $root "train-worker") | nindent 4 }}
  annotations:
    # A training that is moved loses the step that it is at, and a GPU its time to load.
    cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
    karpenter.sh/do-not-disrupt: "true"
    {{- with $v.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "espalier.pod" (list $root "train-worker" $v) | nindent 2 }}
  {{- if $once }}
  restartPolicy: Never
  {{- end }}
  # The time for a step and its checkpoint, and the 15 s of the process and 5 s of its telemetry after it.
  terminationGracePeriodSeconds: {{ add $v.shutdownSeconds 30 }}
  containers:
    - {{- include "espalier.container" (list $root "train-worker" $v) | nindent 6 }}
      args:
        - --device={{ ternary "cuda:0" "cpu" $v.gpu }}
        - --download-dir=/models
        - --shutdown-timeout={{ $v.shutdownSeconds }}
        {{- if $once }}
        - --once
        {{- end }}
        {{- range $v.args }}
        - {{ . | quote }}
        {{- end }}
      env:
        {{- include "espalier.env" $root | nindent 8 }}
        {{- include "espalier.hubEnv" $root | nindent 8 }}
        - name: ESPALIER_TRAIN_WORKER_COORDINATOR_URL
          value: {{ include "espalier.coordinatorUrl" $root }}
        {{- if $root.Values.tls.existingSecret }}
        - name: ESPALIER_TRAIN_WORKER_COORDINATOR_CA
          value: /etc/espalier/ca/ca.crt
        {{- end }}
        - name: ESPALIER_TRAIN_WORKER_HEALTH_LISTEN
          value: "0.0.0.0:7414"
        - name: ESPALIER_TRAIN_WORKER_STORE_URL
          value: {{ $root.Values.store.url | quote }}
        {{- include "espalier.secretEnv" (list "ESPALIER_TRAIN_WORKER_TOKEN" $root.Values.workerToken.existingSecret $root.Values.workerToken.key) | nindent 8 }}
        {{- with $v.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- include "espalier.healthProbes" . | nindent 6 }}
      resources:
        {{- include "espalier.resources" $v | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: /models}
        - {name: tmp, mountPath: /tmp}
        {{- include "espalier.caMount" $root | nindent 8 }}
  volumes:
    {{- include "espalier.modelCache" $v | nindent 4 }}
    - name: tmp
      emptyDir: {sizeLimit: 2Gi}
    {{- include "espalier.caVolume" $root | nindent 4 }}
{{- end }}
