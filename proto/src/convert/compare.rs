//! Specs of comparisons.

use espalier_core::spec::{CompareArmDraft, CompareDraft};

use crate::v1;

/// The draft that `wire` stands for.
pub fn from_wire(wire: v1::CompareSpec) -> CompareDraft {
    CompareDraft {
        arms: wire.arms.into_iter().map(arm_from_wire).collect(),
        trainings: wire.trainings,
        traces: wire.traces,
        currency: wire.currency,
        min_difference: wire.min_difference,
        min_tasks: wire.min_tasks,
        turns: wire.turns,
    }
}

fn arm_from_wire(wire: v1::CompareArm) -> CompareArmDraft {
    CompareArmDraft {
        label: wire.label,
        model: wire.model,
        adapter: wire.adapter,
        batches: wire.batches,
        labels: wire.labels,
        filter: wire.r#where,
        prompt_price: wire.prompt_price,
        completion_price: wire.completion_price,
    }
}

/// What stands for `draft` on the wire.
pub fn to_wire(draft: CompareDraft) -> v1::CompareSpec {
    v1::CompareSpec {
        arms: draft.arms.into_iter().map(arm_to_wire).collect(),
        trainings: draft.trainings,
        traces: draft.traces,
        currency: draft.currency,
        min_difference: draft.min_difference,
        min_tasks: draft.min_tasks,
        turns: draft.turns,
    }
}

fn arm_to_wire(draft: CompareArmDraft) -> v1::CompareArm {
    v1::CompareArm {
        label: draft.label,
        model: draft.model,
        adapter: draft.adapter,
        batches: draft.batches,
        labels: draft.labels,
        r#where: draft.filter,
        prompt_price: draft.prompt_price,
        completion_price: draft.completion_price,
    }
}
