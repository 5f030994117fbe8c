//! From recorded conversations to what a model is trained on.
//!
//! ```text
//! traces, files ─► Source ─► Builder, Chosen ─► Row ─► files ─► Row ─► Sample ─► Packed
//! ```
//!
//! A [`Source`] is a conversation with its facts. [`Builder`] chooses among many and unrolls them into [`Row`]s, which
//! files hold; a row becomes a [`Sample`]: token ids, and which of them are trained. Samples are laid end to end as
//! [`Packed`], in an [`Order`].
//!
//! What it is not: it reads no object store and knows no jobs. Whoever builds or trains brings bytes and takes bytes.

#![cfg_attr(
    test,
    expect(
        clippy::single_range_in_vec_init,
        reason = "a sample with one supervised range is meant"
    )
)]

mod build;
pub mod files;
mod filter;
mod import;
mod manifest;
mod near;
mod order;
mod pack;
mod recorded;
mod render;
mod rerender;
mod row;
mod sample;
mod secrets;
mod source;
mod tally;
mod unroll;

pub use build::{BuildSpec, Builder, Chosen, SOURCES_MAX};
pub use filter::{Filter, FilterError};
pub use import::{import, json_records};
pub use manifest::{Counts, DatasetManifest, DropReason, SCHEMA_VERSION, SourceEntry};
pub use order::Order;
pub use pack::{PackError, Packed, Packing, pack};
pub use recorded::{Drift, RowsOptions, rows, spells};
pub use render::{RenderError, Rendered, Renderer};
pub use rerender::{Difference, Part, Rerendered, rerender};
pub use row::{Recorded, Row, Split};
pub use sample::{Origin, Sample, SampleError, TurnsCut, sample, samples};
pub use secrets::Secrets;
pub use source::{Facts, Source, SourceCall};
pub use tally::{KindTally, Tally};
pub use unroll::{Cut, Unroll, cuts};
