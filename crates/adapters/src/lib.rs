//! Versions of adapters, from the object store to wherever they are wanted: listed, pulled as PEFT has them, added, merged
//! with their base into one model, and exported to the hub or to a folder of the store.
//!
//! ```text
//! versions   what there is, and the record of one
//! pull       its files into a folder, verified
//! add        a folder that was made elsewhere becomes a version
//! latest     which version is served to those who name none
//! content    the digest by which servers name a version
//! merged     base and adapter become one model
//! export     any of these to the hub or to the store; done again it changes nothing
//! card       the page that goes with it
//! ```
//! The CLI, the workers' `export` jobs and inference workers that follow adapters do the same by these functions. What this
//! is not: it trains nothing, and knows no queue.

mod add;
mod card;
mod content;
mod error;
mod export;
mod latest;
mod merged;
mod pull;
mod versions;
mod watch;

pub use add::{Added, add};
pub use card::{Form, card};
pub use content::content_digest;
pub use error::AdaptersError;
pub use export::{Exported, Exporter, Order};
pub use latest::Latest;
pub use merged::{BaseCheck, base_digest};
pub use pull::{Scratch, clear, pull, pull_within};
pub use versions::{Listed, find, list, list_one};
pub use watch::Watch;
