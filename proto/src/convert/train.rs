//! Specs of training.

use espalier_core::spec::{TrainDraft, TrainSettingsDraft};

use crate::v1::{self, TrainSettings};

/// `$into` with the settings of `$from`: both sides have the same fields.
macro_rules! settings {
    ($into:ident, $from:expr) => {
        settings! {
            $into, $from,
                method rank alpha rslora targets max_length
                batch accumulation packing epochs max_steps lr
                schedule warmup_steps weight_decay clip_norm optimizer beta1
                beta2 eps seed eval_every checkpoint_every keep_checkpoints
                memory_budget_mib
        }
    };
    ($into:ident, $from:expr, $($field:ident)*) => {{
        let from = $from;
        $into { $($field: from.$field),* }
    }};
}

/// The draft that `wire` stands for.
pub fn from_wire(wire: v1::TrainSpec) -> TrainDraft {
    TrainDraft {
        base: wire.base,
        revision: wire.revision,
        dataset: wire.dataset,
        rows: wire.rows,
        eval_rows: wire.eval_rows,
        adapter: wire.adapter,
        agreement: wire.agreement,
        settings: settings!(TrainSettingsDraft, wire.settings.unwrap_or_default()),
    }
}

/// What stands for `draft` on the wire.
pub fn to_wire(draft: TrainDraft) -> v1::TrainSpec {
    v1::TrainSpec {
        base: draft.base,
        revision: draft.revision,
        dataset: draft.dataset,
        rows: draft.rows,
        eval_rows: draft.eval_rows,
        adapter: draft.adapter,
        agreement: draft.agreement,
        settings: Some(settings!(TrainSettings, draft.settings)),
    }
}
