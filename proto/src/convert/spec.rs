//! Job specs.

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::spec::{
    ExportDraft, GenerateDraft, JobDraft, LimitsDraft, McpServer, McpUseDraft, ObservationDraft,
    PromptDraft, SamplingDraft, ScoreDraft, ToolPolicy,
};
use prost::Message;

use super::{compare, curate, train, verify};
use crate::v1;

/// The draft that `spec` stands for.
///
/// # Errors
/// Names a `verify` tree that is not one; everything else can be said as a draft.
pub fn draft_from_wire(spec: v1::JobSpec) -> Result<JobDraft, FieldError> {
    let rollout = spec.rollout.unwrap_or_default();
    let verify = rollout
        .verify
        .as_ref()
        .map(|v| verify::from_wire(v).map_err(|e| e.under("verify")))
        .transpose()?;
    Ok(JobDraft {
        id: spec.id,
        priority: spec.priority,
        labels: spec.labels,
        after: spec.after,
        needs: spec.needs,
        delay_ms: spec.delay_ms,
        max_attempts: spec.max_attempts,
        max_infra: spec.max_infra,
        max_runtime_s: spec.max_runtime_s,
        traceparent: spec.traceparent,
        task_id: rollout.task_id,
        task_kind: rollout.task_kind,
        split: rollout.split,
        group: rollout.group,
        sample_index: rollout.sample_index,
        prompt: prompt_from_wire(rollout.prompts),
        system: rollout.system,
        hints: rollout.hints,
        model: rollout.model,
        sampling: rollout.sampling.map(sampling_from_wire),
        mcp: rollout.mcp.into_iter().map(mcp_from_wire).collect(),
        replay: rollout.replay,
        tools: rollout.tools.map(|t| ToolPolicy {
            allow: t.allow,
            ask: t.ask,
            deny: t.deny,
            brief: t.brief,
            snapshots: t.snapshots,
        }),
        limits: rollout.limits.map(limits_from_wire),
        observation: rollout.observation.map(|o| ObservationDraft {
            max_tokens: o.max_tokens,
            compat_chars: o.compat_chars,
            compact_tokens: o.compact_tokens,
        }),
        verify,
        generate: spec.generate.map(|generate| GenerateDraft {
            requests: generate.requests,
            model: generate.model,
        }),
        train: spec.train.map(train::from_wire),
        curate: spec.curate.map(curate::from_wire),
        compare: spec.compare.map(compare::from_wire),
        score: spec.score.map(|score| ScoreDraft {
            model: score.model,
            traces: score.traces,
            hints: score.hints,
        }),
        export: spec.export.map(|export| ExportDraft {
            adapter: export.adapter,
            merged: export.merged,
            repo: export.repo,
            public: export.public,
            folder: export.folder,
        }),
    })
}

/// What stands for `draft` on the wire.
pub fn draft_to_wire(draft: &JobDraft) -> v1::JobSpec {
    let draft = draft.clone();
    v1::JobSpec {
        id: draft.id,
        priority: draft.priority,
        labels: draft.labels,
        after: draft.after,
        needs: draft.needs,
        delay_ms: draft.delay_ms,
        max_attempts: draft.max_attempts,
        max_infra: draft.max_infra,
        max_runtime_s: draft.max_runtime_s,
        traceparent: draft.traceparent,
        rollout: Some(v1::RolloutSpec {
            task_id: draft.task_id,
            task_kind: draft.task_kind,
            split: draft.split,
            group: draft.group,
            sample_index: draft.sample_index,
            prompts: draft.prompt.turns().to_vec(),
            system: draft.system,
            hints: draft.hints,
            model: draft.model,
            sampling: draft.sampling.map(sampling_to_wire),
            mcp: draft.mcp.into_iter().map(mcp_to_wire).collect(),
            replay: draft.replay,
            tools: draft.tools.map(|t| v1::ToolPolicy {
                allow: t.allow,
                ask: t.ask,
                deny: t.deny,
                brief: t.brief,
                snapshots: t.snapshots,
            }),
            limits: draft.limits.map(limits_to_wire),
            observation: draft.observation.map(|o| v1::Observation {
                max_tokens: o.max_tokens,
                compat_chars: o.compat_chars,
                compact_tokens: o.compact_tokens,
            }),
            verify: draft.verify.as_ref().map(verify::to_wire),
        }),
        generate: draft.generate.map(|generate| v1::GenerateSpec {
            requests: generate.requests,
            model: generate.model,
        }),
        train: draft.train.map(train::to_wire),
        curate: draft.curate.map(curate::to_wire),
        compare: draft.compare.map(compare::to_wire),
        score: draft.score.map(|score| v1::ScoreSpec {
            model: score.model,
            traces: score.traces,
            hints: score.hints,
        }),
        export: draft.export.map(|export| v1::ExportSpec {
            adapter: export.adapter,
            merged: export.merged,
            repo: export.repo,
            public: export.public,
            folder: export.folder,
        }),
    }
}

/// The encoded form of `draft`: what is stored, and what a grant carries.
pub fn encode_draft(draft: &JobDraft) -> Bytes {
    draft_to_wire(draft).encode_to_vec().into()
}

/// Reads a batch's defaults followed by a job's own fields, each encoded; protobuf reads the two as one message.
pub fn decode_draft(defaults: &[u8], own: &[u8]) -> Result<JobDraft, FieldError> {
    let refuse = |e: prost::DecodeError| {
        FieldError::new("spec", "", format!("must be an encoded JobSpec: {e}"))
    };
    let mut spec = v1::JobSpec::decode(defaults).map_err(refuse)?;
    spec.merge(own).map_err(refuse)?;
    draft_from_wire(spec)
}

fn prompt_from_wire(mut prompts: Vec<String>) -> PromptDraft {
    match (prompts.pop(), prompts.is_empty()) {
        (None, _) => PromptDraft::Absent,
        (Some(only), true) => PromptDraft::One(only),
        (Some(last), false) => {
            prompts.push(last);
            PromptDraft::Turns(prompts)
        }
    }
}

fn mcp_from_wire(used: v1::McpUse) -> McpUseDraft {
    match used.server {
        None => McpUseDraft::Named(used.name),
        Some(server) => McpUseDraft::Inline {
            name: used.name,
            server: McpServer {
                command: server.command,
                args: server.args,
                env: server.env,
                cwd: server.cwd,
                url: server.url,
                headers: server.headers,
            },
        },
    }
}

fn mcp_to_wire(used: McpUseDraft) -> v1::McpUse {
    match used {
        McpUseDraft::Named(name) => v1::McpUse { name, server: None },
        McpUseDraft::Inline { name, server } => v1::McpUse {
            name,
            server: Some(v1::McpServer {
                command: server.command,
                args: server.args,
                env: server.env,
                cwd: server.cwd,
                url: server.url,
                headers: server.headers,
            }),
        },
    }
}

fn sampling_from_wire(s: v1::Sampling) -> SamplingDraft {
    SamplingDraft {
        thinking: s.thinking,
        temperature: s.temperature,
        top_p: s.top_p,
        top_k: s.top_k,
        min_p: s.min_p,
        presence_penalty: s.presence_penalty,
        seed: s.seed,
        completion_tokens: s.completion_tokens,
    }
}

fn sampling_to_wire(s: SamplingDraft) -> v1::Sampling {
    v1::Sampling {
        thinking: s.thinking,
        temperature: s.temperature,
        top_p: s.top_p,
        top_k: s.top_k,
        min_p: s.min_p,
        presence_penalty: s.presence_penalty,
        seed: s.seed,
        completion_tokens: s.completion_tokens,
    }
}

fn limits_from_wire(l: v1::Limits) -> LimitsDraft {
    LimitsDraft {
        turns: l.turns,
        tokens: l.tokens,
        wall_s: l.wall_s,
        tool_calls_per_turn: l.tool_calls_per_turn,
        tool_call_s: l.tool_call_s,
        ask_s: l.ask_s,
    }
}

fn limits_to_wire(l: LimitsDraft) -> v1::Limits {
    v1::Limits {
        turns: l.turns,
        tokens: l.tokens,
        wall_s: l.wall_s,
        tool_calls_per_turn: l.tool_calls_per_turn,
        tool_call_s: l.tool_call_s,
        ask_s: l.ask_s,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::spec::{SpecDigest, parse_line};

    const FULL: &str = r#"{"id":"a","priority":9,"labels":{"run":"1"},"after":["b"],"needs":["gpu"],"delay_ms":5,
        "max_attempts":2,"max_infra":3,"max_runtime_s":60,
        "traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "task_id":"t","task_kind":"k","split":"train","group":"g","sample_index":4,"prompt":["x","y"],"system":"s",
        "hints":"h","model":"m","sampling":{"thinking":false,"temperature":0.5,"top_p":0.9,"top_k":5,"min_p":0.1,
        "presence_penalty":1.0,"seed":-3,"completion_tokens":100},
        "mcp":["browser",{"name":"files","server":{"command":"c","args":["a"],"env":{"A":"b"},"cwd":"/"}},
        {"name":"web","server":{"url":"http://localhost/mcp","headers":{"h":"v"}}}],
        "tools":{"allow":["a*"],"ask":["b"],"deny":["c"],"brief":true,"snapshots":"inline"},
        "limits":{"turns":1,"tokens":2,"wall_s":3,"tool_calls_per_turn":4,"tool_call_s":5,"ask_s":6},
        "observation":{"max_tokens":99},"replay":["b/j"],
        "verify":{"all":[{"answer":{"equals":"5"}},{"answer":{"json_path":"$.a","equals":{"b":[1,2.5,null,true]}}},
        {"answer":{"contains":"c"}},{"answer":{"number":1.5,"tolerance":0.1}},{"url":{"regex":"^h"}},
        {"page":{"script":"() => true"}},{"tool_called":{"name":"t*","arguments":{"a":{"equals":"b"}}}},
        {"mcp":{"server":"files","tool":"read","arguments":{"p":1},"text":{"contains":"x"}}},
        {"mcp":{"server":"files","resource":"file:///x","text":{"contains":"x"}}},{"http":{"url":"http://h/"}},
        {"any":[{"url":{"equals":"u"}}]},{"weighted":[{"weight":2.0,"check":{"url":{"contains":"c"}}}]}]}}"#;

    #[test]
    fn a_draft_survives_the_wire() {
        let draft = parse_line(FULL.as_bytes()).unwrap();
        assert!(draft.check().is_ok());
        assert_eq!(decode_draft(&[], &encode_draft(&draft)).unwrap(), draft);
    }

    #[test]
    fn every_rule_of_observation_survives_the_wire() {
        for rule in ["max_tokens", "compat_chars", "compact_tokens"] {
            let line = format!(r#"{{"prompt":"x","observation":{{"{rule}":99}}}}"#);
            let draft = parse_line(line.as_bytes()).unwrap();
            let granted = decode_draft(&[], &encode_draft(&draft)).unwrap();
            assert_eq!(granted, draft);
        }
    }

    #[test]
    fn a_batch_of_requests_survives_the_wire_over_defaults_that_say_nothing_of_its_work() {
        let own = r#"{"id":"a","needs":["gpu"],"generate":{"requests":"a/b.jsonl","model":"m"}}"#;
        let own = parse_line(own.as_bytes()).unwrap();
        let defaults = encode_draft(&parse_line(br#"{"priority":7}"#).unwrap());
        let granted = decode_draft(&defaults, &encode_draft(&own)).unwrap();
        assert_eq!(granted.priority, Some(7));
        assert!(granted.check().unwrap().generate().is_some());
        assert_eq!(SpecDigest::of(&granted), SpecDigest::of(&own));
    }

    #[test]
    fn an_export_survives_the_wire() {
        let own = r#"{"export":{"adapter":"a@v1","merged":true,"repo":"me/a","public":true}}"#;
        let draft = parse_line(own.as_bytes()).unwrap();
        let granted = decode_draft(&[], &encode_draft(&draft)).unwrap();
        assert_eq!(granted.export, draft.export);
        assert!(granted.check().unwrap().export().is_some());
        assert_eq!(SpecDigest::of(&granted), SpecDigest::of(&draft));
    }

    #[test]
    fn a_curation_survives_the_wire() {
        let own = r#"{"curate":{"batches":["a","b"],"uploads":["x/y.jsonl"],"extends":"d@v3","where":"solved",
            "unroll":"compat","drop_hints":false,"near":0.75,"keep_near":true,"max_per_kind":5,"eval_share":0.25,
            "seed":7,"max_length":64,"tokenizer":"qwen3","dataset":"d"}}"#;
        let own = parse_line(own.as_bytes()).unwrap();
        let granted = decode_draft(&[], &encode_draft(&own)).unwrap();
        assert_eq!(granted, own);
        assert!(granted.check().unwrap().curate().is_some());
        assert_eq!(SpecDigest::of(&granted), SpecDigest::of(&own));
    }

    #[test]
    fn a_comparison_survives_the_wire() {
        let own = r#"{"compare":{"arms":[{"label":"old","model":"m","batches":["a","b"],"labels":{"x":"y"},"where":"solved",
            "prompt_price":0.5,"completion_price":1.5},{"adapter":"shop@v2","batches":["a"]}],"trainings":["t/train"],
            "traces":3,"currency":"EUR","min_difference":-0.5,"min_tasks":7,"turns":true}}"#;
        let own = parse_line(own.as_bytes()).unwrap();
        let granted = decode_draft(&[], &encode_draft(&own)).unwrap();
        assert_eq!(granted, own);
        assert!(granted.check().unwrap().compare().is_some());
        assert_eq!(SpecDigest::of(&granted), SpecDigest::of(&own));
    }

    #[test]
    fn scores_survive_the_wire() {
        let own = br#"{"score":{"model":"m","traces":["b/j","b/k"],"hints":true}}"#;
        let own = parse_line(own).unwrap();
        let granted = decode_draft(&[], &encode_draft(&own)).unwrap();
        assert_eq!(granted, own);
        assert!(granted.check().unwrap().score().is_some());
        assert_eq!(SpecDigest::of(&granted), SpecDigest::of(&own));
    }

    #[test]
    fn a_training_survives_the_wire_over_settings_of_the_batch() {
        let own = r#"{"train":{"base":"b","revision":"r","rows":"a.jsonl","eval_rows":"e.jsonl","adapter":"n",
            "agreement":["baseline"],"settings":{"method":"lora","rank":8,"alpha":4.0,"rslora":false,"targets":["q_proj"],"max_length":64,
            "batch":2,"accumulation":3,"packing":true,"max_steps":5,"lr":0.5,"schedule":"cosine","warmup_steps":1,
            "weight_decay":0.25,"clip_norm":0.5,"optimizer":"adamw","beta1":0.5,"beta2":0.75,"eps":1e-6,"seed":7,
            "eval_every":2,"checkpoint_every":4,"keep_checkpoints":6,"memory_budget_mib":512}}}"#;
        let own = parse_line(own.as_bytes()).unwrap();
        let granted = decode_draft(&[], &encode_draft(&own)).unwrap();
        assert_eq!(granted, own);
        assert!(granted.check().unwrap().train().is_some());
        assert_eq!(SpecDigest::of(&granted), SpecDigest::of(&own));
        let defaults =
            br#"{"train":{"base":"x","dataset":"d@v1","settings":{"rank":4,"lr":0.25}}}"#;
        let own = br#"{"train":{"adapter":"n","settings":{"rank":8}}}"#;
        let [defaults, own] =
            [&defaults[..], own].map(|line| encode_draft(&parse_line(line).unwrap()));
        let merged = decode_draft(&defaults, &own).unwrap().train.unwrap();
        assert_eq!(
            (merged.base.as_deref(), merged.adapter.as_deref()),
            (Some("x"), Some("n"))
        );
        assert_eq!(
            (merged.settings.rank, merged.settings.lr),
            (Some(8), Some(0.25))
        );
    }

    #[test]
    fn defaults_go_under_the_jobs_own_words() {
        let defaults = parse_line(
            br#"{"mcp":["browser"],"priority":1,"labels":{"a":"1","b":"1"},"limits":{"turns":5,"wall_s":7}}"#,
        );
        let own =
            parse_line(br#"{"prompt":"x","priority":2,"labels":{"b":"2"},"limits":{"turns":6}}"#);
        let merged = decode_draft(
            &encode_draft(&defaults.unwrap()),
            &encode_draft(&own.unwrap()),
        )
        .unwrap();
        let expected = parse_line(
            br#"{"mcp":["browser"],"prompt":"x","priority":2,"labels":{"a":"1","b":"2"},
                "limits":{"turns":6,"wall_s":7}}"#,
        );
        let expected = expected.unwrap();
        assert_eq!(merged, expected);
        assert_eq!(SpecDigest::of(&merged), SpecDigest::of(&expected));
    }

    #[test]
    fn a_spec_has_the_same_digest_on_both_sides_of_the_wire() {
        for line in [FULL, r#"{"prompt":["x"]}"#] {
            let draft = parse_line(line.as_bytes()).unwrap();
            let granted = decode_draft(&[], &encode_draft(&draft)).unwrap();
            assert_eq!(SpecDigest::of(&granted), SpecDigest::of(&draft));
        }
    }

    #[test]
    fn bytes_that_are_no_spec_are_refused() {
        let error = decode_draft(&[], b"\xff\xff\xff").unwrap_err();
        assert_eq!(error.field, "spec");
    }
}
