{{/*
What is missing or contradicts itself, said so that whoever installs knows what to set. What a value may look like is
said by values.schema.json.
*/}}
{{- define "espalier.validate" -}}
{{- $v := .Values -}}
{{- if not $v.image.repository }}
{{- fail "image.repository must be given: where the images coordinator, agent-worker, … are, such as registry.example/espalier" }}
{{- end }}
{{- if not $v.store.url }}
{{- fail "store.url must be given: the bucket that coordinators and workers share, such as s3://bucket/espalier" }}
{{- end }}
{{- if not (hasPrefix "s3://" $v.store.url) }}
{{- fail (printf "store.url must begin with s3://, got %s: pods have no folder in common" $v.store.url) }}
{{- end }}
{{- if and $v.store.endpoint (not (regexMatch "^https?://[^/]+$" $v.store.endpoint)) }}
{{- fail (printf "store.endpoint must be http://host:port or https://host:port, got %s" $v.store.endpoint) }}
{{- end }}
{{- if and $v.store.endpoint $v.networkPolicy.enabled }}
{{- $port := default (ternary "443" "80" (hasPrefix "https://" $v.store.endpoint)) (regexFind "[0-9]+$" (regexFind ":[0-9]+$" $v.store.endpoint)) }}
{{- $open := list }}
{{- range $v.networkPolicy.store.ports }}{{ $open = append $open (toString .) }}{{ end }}
{{- if not (has $port $open) }}
{{- fail (printf "networkPolicy.store.ports must have %s, the port of store.endpoint, got [%s]: no pod would reach it; networkPolicy.store.to names a server that is in the cluster or at a private address" $port (join ", " $open)) }}
{{- end }}
{{- end }}
{{- if and $v.telemetry.otlpEndpoint (not (hasPrefix "http://" $v.telemetry.otlpEndpoint)) }}
{{- fail (printf "telemetry.otlpEndpoint must begin with http://, got %s: OTLP goes to a collector in the cluster without TLS" $v.telemetry.otlpEndpoint) }}
{{- end }}
{{- include "espalier.validate.coordinator" . }}
{{- if and (or $v.agentWorker.enabled $v.inferWorker.enabled $v.trainWorker.enabled) (not $v.workerToken.existingSecret) }}
{{- fail "workerToken.existingSecret must be given: a Secret with the token that workers show, under the key of workerToken.key" }}
{{- end }}
{{- if and $v.agentWorker.enabled (not $v.agentWorker.modelName) }}
{{- fail "agentWorker.modelName must be given: the model of jobs that name none, such as Qwen/Qwen3-4B; or set agentWorker.enabled to false" }}
{{- end }}
{{- if and $v.inferWorker.enabled (not $v.inferWorker.model) }}
{{- fail "inferWorker.model must be given: a repository of the hub such as Qwen/Qwen3-4B, or s3://…; or set inferWorker.enabled to false" }}
{{- end }}
{{- if and $v.keda.enabled (not $v.coordinator.enabled) }}
{{- fail "keda.enabled must be false where coordinator.enabled is: KEDA asks the coordinators of this release" }}
{{- end }}
{{- $s := $v.agentWorker.scaling }}
{{- if gt (int $s.minReplicas) (int $s.maxReplicas) }}
{{- fail (printf "agentWorker.scaling.minReplicas must be at most maxReplicas, which is %d, got %d" (int $s.maxReplicas) (int $s.minReplicas)) }}
{{- end }}
{{- if and $v.keda.enabled (le (int $s.cooldownSeconds) (mul 2 (int $v.keda.pollingSeconds))) }}
{{- fail (printf "agentWorker.scaling.cooldownSeconds must be more than twice keda.pollingSeconds, which is %d, got %d: KEDA would end busy pods where one of two kinds of jobs has none left" (int $v.keda.pollingSeconds) (int $s.cooldownSeconds)) }}
{{- end }}
{{- range $name := list "agentWorker" "inferWorker" "trainWorker" "coordinator" }}
{{- $limits := (index $v $name).resources.limits }}
{{- if not (and $limits $limits.memory) }}
{{- fail (printf "%s.resources.limits.memory must be given: without it one pod can take the memory of its whole node" $name) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "espalier.validate.coordinator" -}}
{{- $v := .Values -}}
{{- if not $v.coordinator.enabled }}
{{- if not $v.coordinatorUrl }}
{{- fail "coordinatorUrl must be given where coordinator.enabled is false: the address of the coordinators, such as https://coordinator.ml:7411" }}
{{- end }}
{{- if ne (hasPrefix "https://" $v.coordinatorUrl) (not (empty $v.tls.existingSecret)) }}
{{- fail (printf "coordinatorUrl is %s: it must be https:// where tls.existingSecret is given, and http:// where it is not" $v.coordinatorUrl) }}
{{- end }}
{{- else }}
{{- if not $v.redis.existingSecret }}
{{- fail "redis.existingSecret must be given: a Secret with the address of Redis, such as redis://:password@redis:6379/0, under the key of redis.key" }}
{{- end }}
{{- if and (not $v.coordinator.tokens) (not $v.coordinator.tokensSecret) }}
{{- fail "coordinator.tokens must have an entry: without a token nobody can call. For workers: {name: workers, sha256: …, project: \"*\", roles: [worker]}" }}
{{- end }}
{{- if and $v.coordinator.tokens $v.coordinator.tokensSecret }}
{{- fail "coordinator.tokens and coordinator.tokensSecret are both given: leave one of them out" }}
{{- end }}
{{- if and $v.coordinator.tokens (or $v.agentWorker.enabled $v.inferWorker.enabled $v.trainWorker.enabled) }}
{{- $found := false }}
{{- range $v.coordinator.tokens }}{{ if has "worker" .roles }}{{ $found = true }}{{ end }}{{ end }}
{{- if not $found }}
{{- fail "coordinator.tokens must have an entry with the role worker and the project \"*\": workers cannot connect without one" }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
