//! Every name that telemetry uses: spans, attributes, metrics. Nowhere else is such a name written.
//!
//! `gen_ai.*` and `mcp.*` follow the OpenTelemetry semantic conventions for generative AI and for the Model Context
//! Protocol (both in development, in the repository `open-telemetry/semantic-conventions-genai`); what they have no
//! name for is `espalier.*`. Prompts, answers, tool arguments and tool results have no name here on purpose: the
//! trace object is referenced instead. Dashboards and documentation follow this file.

/// Spans. Where the conventions ask for a target (`chat {model}`), it goes into `otel.name` at run time.
pub mod span {
    /// Coordinator side: a chunk of jobs is taken in. Attempts of jobs that bring no trace context link to it.
    pub const SUBMIT: &str = "submit";
    /// Worker side: one attempt of a job, from grant to finish. Links to the submission.
    pub const ATTEMPT: &str = "attempt";
    /// The whole rollout; `gen_ai.operation.name = invoke_agent`.
    pub const INVOKE_AGENT: &str = "invoke_agent";
    /// One model call; `gen_ai.operation.name = chat`.
    pub const CHAT: &str = "chat";
    /// One tool call; `gen_ai.operation.name = execute_tool`.
    pub const EXECUTE_TOOL: &str = "execute_tool";
    /// The verifiers of a rollout.
    pub const VERIFY: &str = "verify";
    /// Files and manifest of an attempt go to the store.
    pub const PUBLISH: &str = "publish";
}

/// Attributes of spans, metrics and log records.
pub mod attribute {
    /// `chat`, `execute_tool` or `invoke_agent`.
    pub const GEN_AI_OPERATION_NAME: &str = "gen_ai.operation.name";
    /// Whose sort of endpoint was called: always `openai`, which any compatible one speaks.
    pub const GEN_AI_PROVIDER_NAME: &str = "gen_ai.provider.name";
    /// The model that was asked for.
    pub const GEN_AI_REQUEST_MODEL: &str = "gen_ai.request.model";
    /// The name of the endpoint that answered, of those that a coordinator names.
    pub const MODEL_ENDPOINT: &str = "espalier.model.endpoint";
    /// The model that answered.
    pub const GEN_AI_RESPONSE_MODEL: &str = "gen_ai.response.model";
    /// The endpoint's id of the answer.
    pub const GEN_AI_RESPONSE_ID: &str = "gen_ai.response.id";
    /// Why the model stopped.
    pub const GEN_AI_RESPONSE_FINISH_REASONS: &str = "gen_ai.response.finish_reasons";
    /// Tokens of the prompt.
    pub const GEN_AI_USAGE_INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
    /// Tokens of the answer.
    pub const GEN_AI_USAGE_OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
    /// `input` or `output`.
    pub const GEN_AI_TOKEN_TYPE: &str = "gen_ai.token.type";
    /// The tool as the model named it.
    pub const GEN_AI_TOOL_NAME: &str = "gen_ai.tool.name";
    /// The id that ties a tool's result to the call.
    pub const GEN_AI_TOOL_CALL_ID: &str = "gen_ai.tool.call.id";
    /// `function`, `extension` or `datastore`.
    pub const GEN_AI_TOOL_TYPE: &str = "gen_ai.tool.type";
    /// The agent; here the kind of the task.
    pub const GEN_AI_AGENT_NAME: &str = "gen_ai.agent.name";
    /// One rollout.
    pub const GEN_AI_CONVERSATION_ID: &str = "gen_ai.conversation.id";
    /// Method of an MCP request, such as `tools/call`.
    pub const MCP_METHOD_NAME: &str = "mcp.method.name";
    /// Class of the error, of a small closed set.
    pub const ERROR_TYPE: &str = "error.type";
    /// Name of the configured MCP server.
    pub const MCP_SERVER: &str = "espalier.mcp.server";
    /// The tenant.
    pub const PROJECT: &str = "espalier.project";
    /// The batch.
    pub const BATCH: &str = "espalier.batch.id";
    /// How many jobs a chunk has.
    pub const JOBS: &str = "espalier.chunk.jobs";
    /// The job.
    pub const JOB: &str = "espalier.job.id";
    /// Kind of the job: `rollout`, `curate`, …
    pub const JOB_KIND: &str = "espalier.job.kind";
    /// State of the job: `ready`, `leased`, …
    pub const JOB_STATE: &str = "espalier.job.state";
    /// The attempt's number, from 1.
    pub const ATTEMPT: &str = "espalier.attempt";
    /// The lease's fence.
    pub const FENCE: &str = "espalier.fence";
    /// The worker process.
    pub const WORKER: &str = "espalier.worker.id";
    /// The task that a rollout tries.
    pub const TASK: &str = "espalier.task.id";
    /// Kind of that task.
    pub const TASK_KIND: &str = "espalier.task.kind";
    /// How it ended: `succeeded`, `dead`, `infra`, …
    pub const OUTCOME: &str = "espalier.outcome";
    /// `solved`, `failed` or `unjudged` of a rollout; `accepted` or `dropped` of what a data set looked at.
    pub const VERDICT: &str = "espalier.verdict";
    /// The verifier's verdict in [0, 1].
    pub const REWARD: &str = "espalier.reward";
    /// Path of the trace object in the store.
    pub const TRACE_PATH: &str = "espalier.trace.path";
    /// Name of a wait that has a deadline.
    pub const WAIT: &str = "espalier.wait";
    /// A pool of workers, as the configuration names it.
    pub const SCALER_POOL: &str = "espalier.scaler.pool";
    /// Who makes its workers: `local`, …
    pub const SCALER_PROVIDER: &str = "espalier.scaler.provider";
    /// How an instance is: `starting`, `running` or `failed`.
    pub const SCALER_STATE: &str = "espalier.scaler.state";
    /// Why an instance is ended: `idle`, `unneeded`, `duplicate`, `failed` or `lost`.
    pub const SCALER_REASON: &str = "espalier.scaler.reason";
    /// Operation on the object store: `create`, `get`, …
    pub const STORE_OPERATION: &str = "espalier.store.operation";
}

/// Targets of log records that are asked for by name.
pub mod target {
    /// At debug level, a line for each grant and for each end of an attempt with the queue's verdict.
    pub const HISTORY: &str = "espalier_coordinator::history";
}

/// Values of `gen_ai.operation.name`.
pub mod operation {
    /// A call of the model.
    pub const CHAT: &str = "chat";
    /// A call of the model without turns.
    pub const TEXT_COMPLETION: &str = "text_completion";
    /// A call of a tool.
    pub const EXECUTE_TOOL: &str = "execute_tool";
    /// A whole rollout.
    pub const INVOKE_AGENT: &str = "invoke_agent";
}

/// Values of `gen_ai.provider.name`.
pub mod provider {
    /// Whoever speaks OpenAI's API.
    pub const OPENAI: &str = "openai";
    /// This project's own server.
    pub const ESPALIER: &str = "espalier";
}

/// Metrics. Units are UCUM, as OpenTelemetry asks.
pub mod metric {
    /// Gauge, `{job}`: jobs in a state, by project and state. As of every gauge of the queue, each coordinator measures
    /// all of it: read it with `max` over coordinators.
    pub const QUEUE_DEPTH: &str = "espalier.queue.depth";
    /// Gauge, `s`: age of the oldest ready job, by project.
    pub const QUEUE_OLDEST_READY_AGE: &str = "espalier.queue.oldest_ready.age";
    /// Gauge, `1`: share of the memory that the queue's server may use, where it has a limit.
    pub const QUEUE_MEMORY_USED: &str = "espalier.queue.memory.used";
    /// Counter, `{failover}`: times at which the queue's server was restarted or replaced by another. Each coordinator
    /// sees them all: read it with `max`.
    pub const QUEUE_FAILOVERS: &str = "espalier.queue.failovers";
    /// Counter, `{job}`: acknowledged jobs that the queue had lost and was given again.
    pub const QUEUE_REDRIVEN: &str = "espalier.queue.redriven";
    /// Counter, `{lease}`: leases handed out, by project and kind.
    pub const LEASE_GRANTS: &str = "espalier.lease.grants";
    /// Counter, `{lease}`: leases that ran out, by project. Every coordinator hears of each: read it with `max`.
    pub const LEASE_EXPIRIES: &str = "espalier.lease.expiries";
    /// Counter, `{request}`: renewals and finishes under a fence that is not current.
    pub const LEASE_STALE_FENCES: &str = "espalier.lease.stale_fences";
    /// Counter, `{attempt}`: finished attempts, by project, kind and outcome.
    pub const JOB_FINISHES: &str = "espalier.job.finishes";
    /// Counter, `{rollout}`: results of rollouts that were taken, by project and verdict: `solved`, `failed`, or `unjudged`
    /// where there was nothing to judge by.
    pub const ROLLOUT_VERDICTS: &str = "espalier.rollout.verdicts";
    /// Counter, `{conversation}`: conversations that were looked at for data sets, by project and verdict: `accepted` or
    /// `dropped`.
    pub const DATASET_CONVERSATIONS: &str = "espalier.dataset.conversations";
    /// Gauge, `{worker}`: sessions of workers that are connected, by kind of job. Each coordinator has its own: read it with
    /// `sum`.
    pub const WORKERS_CONNECTED: &str = "espalier.worker.connected";
    /// Counter, `{USD}`: what workers cost while they were connected, by kind of job, where the configuration has a price.
    pub const COST_WORKERS: &str = "espalier.cost.workers";
    /// Gauge, `{USD}`: price of a token, by model and type, where the configuration has one. Each coordinator tells the same:
    /// read it with `max`. Times `gen_ai.client.token.usage` it is what tokens cost.
    pub const COST_TOKEN_PRICE: &str = "espalier.cost.token.price";
    /// Gauge, `{USD}`: what a day may cost, where the configuration says. Read it with `max`.
    pub const COST_BUDGET: &str = "espalier.cost.budget";
    /// Counter, `{job}`: jobs accepted, by project and kind.
    pub const JOB_SUBMISSIONS: &str = "espalier.job.submissions";
    /// Gauge, `{coordinator}`: 1 while a coordinator serves workers, 0 while its queue is away or it drains. Read it with `sum`
    /// for how many do.
    pub const COORDINATOR_READY: &str = "espalier.coordinator.ready";
    /// Up-down counter, `{training}`: trainings that run now, 0 or 1 of each worker.
    pub const TRAININGS_RUNNING: &str = "espalier.train.running";
    /// Gauge, `{step}`: optimizer steps that the training of this worker has done. As of all gauges of trainings: a worker
    /// has one training at a time.
    pub const TRAIN_STEP: &str = "espalier.train.step";
    /// Gauge, `1`: mean loss of the last step's supervised tokens.
    pub const TRAIN_LOSS: &str = "espalier.train.loss";
    /// Gauge, `1`: mean loss of held-out samples, when they were last measured.
    pub const TRAIN_EVAL_LOSS: &str = "espalier.train.eval_loss";
    /// Gauge, `1`: mean amount, in nats, by which log-probabilities of sampled tokens differ between serving and training.
    pub const TRAIN_AGREEMENT: &str = "espalier.train.agreement";
    /// Gauge, `1`: norm of the last step's gradient before it was clipped.
    pub const TRAIN_GRAD_NORM: &str = "espalier.train.grad_norm";
    /// Counter, `{token}`: tokens that went through models in training.
    pub const TRAIN_TOKENS: &str = "espalier.train.tokens";
    /// Gauge, `{token}/s`: tokens of the last step by the time that it took.
    pub const TRAIN_TOKENS_PER_SECOND: &str = "espalier.train.tokens_per_second";
    /// Gauge, `1`: share of the machine's matrix peak.
    pub const TRAIN_PEAK_SHARE: &str = "espalier.train.peak_share";
    /// Gauge, `By`: memory that the training holds.
    pub const TRAIN_MEMORY: &str = "espalier.train.memory";
    /// Gauge, `s`: time that is left, at this speed.
    pub const TRAIN_TIME_LEFT: &str = "espalier.train.time_left";
    /// Counter, `{call}`: calls without a valid token or with one of the wrong role, by reason.
    pub const AUTH_FAILURES: &str = "espalier.auth.failures";
    /// Up-down counter, `{rollout}`: rollouts that run now.
    pub const ROLLOUTS_RUNNING: &str = "espalier.rollout.running";
    /// Counter, `{turn}`: model turns of rollouts.
    pub const ROLLOUT_TURNS: &str = "espalier.rollout.turns";
    /// Histogram, `s`: time of a turn that is neither the model's nor a tool's.
    pub const ROLLOUT_TURN_OVERHEAD: &str = "espalier.rollout.turn.overhead";
    /// Gauge, `{instance}`: instances that a scaler has, by provider, pool and state. As of all gauges of scalers: the one
    /// coordinator that asks the provider tells it, and the others tell nothing or 0: read it with `max`.
    pub const SCALER_INSTANCES: &str = "espalier.scaler.instances";
    /// Gauge, `{instance}`: instances that a pool should have, by provider and pool.
    pub const SCALER_WANTED: &str = "espalier.scaler.wanted";
    /// Gauge, `{job}`: jobs, waiting and running, that decide about a pool, by provider and pool.
    pub const SCALER_DEMAND: &str = "espalier.scaler.demand";
    /// Gauge, `{USD}`: what the instances of a pool cost in an hour, by provider and pool.
    pub const SCALER_PRICE: &str = "espalier.scaler.hourly_price";
    /// Gauge, `{USD}`: what instances have cost since midnight in UTC, by provider.
    pub const SCALER_SPENT_TODAY: &str = "espalier.scaler.spent_today";
    /// Gauge, `{USD}`: what they may cost in a day, by provider, where there is a bound.
    pub const SCALER_BUDGET_DAY: &str = "espalier.scaler.budget_day";
    /// Counter, `{instance}`: instances that were asked for, by provider and pool.
    pub const SCALER_CREATES: &str = "espalier.scaler.creates";
    /// Counter, `{instance}`: instances that were ended, by provider, pool and reason.
    pub const SCALER_DELETES: &str = "espalier.scaler.deletes";
    /// Counter, `{error}`: answers of providers that were none, by provider and class.
    pub const SCALER_ERRORS: &str = "espalier.scaler.errors";
    /// Counter, `{connection}`: sessions with a coordinator that a worker lost and took up again.
    pub const WORKER_RECONNECTS: &str = "espalier.worker.reconnects";
    /// Counter, `{timeout}`: waits that came to their deadline, by name.
    pub const WAIT_TIMEOUTS: &str = "espalier.wait.timeouts";
    /// Counter, `{error}`: operations of the object store that failed for good, by operation and class.
    pub const STORE_ERRORS: &str = "espalier.store.errors";
    /// Counter, `{retry}`: model calls that were tried again, by class of the error.
    pub const MODEL_RETRIES: &str = "espalier.model.retries";
    /// Histogram, `{token}`: tokens of a model call, by type and model.
    pub const GEN_AI_TOKEN_USAGE: &str = "gen_ai.client.token.usage";
    /// Histogram, `s`: duration of a model call, retries included.
    pub const GEN_AI_OPERATION_DURATION: &str = "gen_ai.client.operation.duration";
    /// Histogram, `s`: time to the first piece of a streamed answer.
    pub const GEN_AI_TIME_TO_FIRST_CHUNK: &str = "gen_ai.client.operation.time_to_first_chunk";
    /// Histogram, `s`: at the server of a model, a request from its first byte to the last of its answer.
    pub const GEN_AI_SERVER_REQUEST_DURATION: &str = "gen_ai.server.request.duration";
    /// Histogram, `s`: at the server of a model, from a request's first byte to the first token.
    pub const GEN_AI_SERVER_TIME_TO_FIRST_TOKEN: &str = "gen_ai.server.time_to_first_token";
    /// Histogram, `s`: at the server of a model, time for each token after the first.
    pub const GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN: &str = "gen_ai.server.time_per_output_token";
    /// Gauge, `{request}`: answers that wait for their first step, by model.
    pub const INFER_WAITING: &str = "espalier.infer.waiting";
    /// Gauge, `{request}`: answers that run, by model.
    pub const INFER_RUNNING: &str = "espalier.infer.running";
    /// Gauge, `{row}`: sequences of the last step, by model.
    pub const INFER_BATCH_ROWS: &str = "espalier.infer.batch.rows";
    /// Gauge, `1`: share of the memory for keys and values in use, by model.
    pub const INFER_KV_USED: &str = "espalier.infer.kv.used";
    /// Counter, `{preemption}`: answers that gave up their memory and were computed again, by model.
    pub const INFER_PREEMPTIONS: &str = "espalier.infer.preemptions";
    /// Counter, `{token}`: tokens of prompts, by model.
    pub const INFER_PREFIX_QUERIES: &str = "espalier.infer.prefix.queries";
    /// Counter, `{token}`: of these, tokens that were found computed, by model.
    pub const INFER_PREFIX_HITS: &str = "espalier.infer.prefix.hits";
    /// Histogram, `s`: duration of a tool call.
    pub const GEN_AI_EXECUTE_TOOL_DURATION: &str = "gen_ai.execute_tool.duration";
    /// Histogram, `s`: duration of a rollout.
    pub const GEN_AI_INVOKE_AGENT_DURATION: &str = "gen_ai.invoke_agent.duration";
    /// Histogram, `s`: duration of an MCP request.
    pub const MCP_OPERATION_DURATION: &str = "mcp.client.operation.duration";
}

/// Keys of the resource that a process reports as.
pub mod resource {
    /// The role of the process: `espalier-coordinator`, …
    pub const SERVICE_NAME: &str = "service.name";
    /// Its version.
    pub const SERVICE_VERSION: &str = "service.version";
    /// The process itself.
    pub const SERVICE_INSTANCE_ID: &str = "service.instance.id";
}
