//! Specs of data sets.

use espalier_core::spec::CurateDraft;

use crate::v1;

/// The draft that `wire` stands for.
pub fn from_wire(wire: v1::CurateSpec) -> CurateDraft {
    CurateDraft {
        batches: wire.batches,
        uploads: wire.uploads,
        extends: wire.extends,
        filter: wire.r#where,
        unroll: wire.unroll,
        drop_hints: wire.drop_hints,
        near: wire.near,
        keep_near: wire.keep_near,
        max_per_kind: wire.max_per_kind,
        eval_share: wire.eval_share,
        seed: wire.seed,
        max_length: wire.max_length,
        tokenizer: wire.tokenizer,
        dataset: wire.dataset,
    }
}

/// What stands for `draft` on the wire.
pub fn to_wire(draft: CurateDraft) -> v1::CurateSpec {
    v1::CurateSpec {
        batches: draft.batches,
        uploads: draft.uploads,
        extends: draft.extends,
        r#where: draft.filter,
        unroll: draft.unroll,
        drop_hints: draft.drop_hints,
        near: draft.near,
        keep_near: draft.keep_near,
        max_per_kind: draft.max_per_kind,
        eval_share: draft.eval_share,
        seed: draft.seed,
        max_length: draft.max_length,
        tokenizer: draft.tokenizer,
        dataset: draft.dataset,
    }
}
