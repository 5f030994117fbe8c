//! Specs of training.

use espalier_core::spec::{TrainDraft, TrainSettingsDraft};

use crate::v1;

/// The draft that `wire` stands for.
pub fn from_wire(wire: v1::TrainSpec) -> TrainDraft {
    let settings = wire.settings.unwrap_or_default();
    TrainDraft {
        base: wire.base,
        revision: wire.revision,
        dataset: wire.dataset,
        rows: wire.rows,
        eval_rows: wire.eval_rows,
        adapter: wire.adapter,
        settings: TrainSettingsDraft {
            method: settings.method,
            rank: settings.rank,
            alpha: settings.alpha,
            rslora: settings.rslora,
            targets: settings.targets,
            max_length: settings.max_length,
            batch: settings.batch,
            accumulation: settings.accumulation,
            packing: settings.packing,
            epochs: settings.epochs,
            max_steps: settings.max_steps,
            lr: settings.lr,
            schedule: settings.schedule,
            warmup_steps: settings.warmup_steps,
            weight_decay: settings.weight_decay,
            clip_norm: settings.clip_norm,
            optimizer: settings.optimizer,
            beta1: settings.beta1,
            beta2: settings.beta2,
            eps: settings.eps,
            seed: settings.seed,
            eval_every: settings.eval_every,
            checkpoint_every: settings.checkpoint_every,
            keep_checkpoints: settings.keep_checkpoints,
            memory_budget_mib: settings.memory_budget_mib,
        },
    }
}

/// What stands for `draft` on the wire.
pub fn to_wire(draft: TrainDraft) -> v1::TrainSpec {
    let settings = draft.settings;
    v1::TrainSpec {
        base: draft.base,
        revision: draft.revision,
        dataset: draft.dataset,
        rows: draft.rows,
        eval_rows: draft.eval_rows,
        adapter: draft.adapter,
        settings: Some(v1::TrainSettings {
            method: settings.method,
            rank: settings.rank,
            alpha: settings.alpha,
            rslora: settings.rslora,
            targets: settings.targets,
            max_length: settings.max_length,
            batch: settings.batch,
            accumulation: settings.accumulation,
            packing: settings.packing,
            epochs: settings.epochs,
            max_steps: settings.max_steps,
            lr: settings.lr,
            schedule: settings.schedule,
            warmup_steps: settings.warmup_steps,
            weight_decay: settings.weight_decay,
            clip_norm: settings.clip_norm,
            optimizer: settings.optimizer,
            beta1: settings.beta1,
            beta2: settings.beta2,
            eps: settings.eps,
            seed: settings.seed,
            eval_every: settings.eval_every,
            checkpoint_every: settings.checkpoint_every,
            keep_checkpoints: settings.keep_checkpoints,
            memory_budget_mib: settings.memory_budget_mib,
        }),
    }
}
