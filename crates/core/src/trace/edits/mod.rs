//! Curation of a trace: what people and checks changed of it, as a log of patches that lie beside it.
//!
//! What was published is never written over. Each change is a [`Patch`], an object of its own that is created once under
//! the next free number; one that takes another back is a patch too. [`apply`] is the one place that says what a trace
//! and its log come to, and [`check`] the door through which patches enter a log. Both are pure. The runtime keeps logs
//! in object storage; the command line makes patches; whoever builds data sets reads what they come to.
//!
//! **Names of messages.** A message is named by its number for good: the recorded ones have their index in
//! [`Trace::messages`](super::Trace::messages), those that a patch adds the numbers after them, in the order of the
//! log. Numbers do not move when a message is removed, nor when a patch is taken back, so that patches to different
//! messages mean the same in any order. The *turn* of an assistant message is that message with the results of its
//! calls.

mod apply;
mod bounds;
mod curated;
mod door;
mod patch;
mod standing;
mod state;

#[cfg(test)]
mod property;
#[cfg(test)]
mod tests;

pub use apply::{apply, turns};
pub use bounds::{
    LABEL_BYTES_MAX, LABELS_MAX, PATCH_BYTES_MAX, PATCHES_MAX, TEXT_BYTES_MAX, WHY_BYTES_MAX,
};
pub use curated::{Conversation, Curated, Origin, Refused};
pub use door::{check, recheck};
pub use patch::{Change, Corrections, Edit, Judgement, Patch};
pub use standing::{Standing, live};
pub use state::check_order;
