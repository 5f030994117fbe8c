//! From wire to domain and back. A conversion checks form only; the rules of fields are `core::spec`'s.

mod compare;
mod curate;
mod job;
mod json;
mod spec;
mod train;
mod verify;

pub use job::{
    agreement_from_wire, class_from_wire, class_to_wire, error_to_wire, field_error_to_wire,
    summary_from_wire, summary_to_wire,
};
pub use spec::{decode_draft, draft_from_wire, draft_to_wire, encode_draft};
