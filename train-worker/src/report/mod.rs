//! How a training went, for people and for their tools: every step as a line, a picture of the loss, and TensorBoard's
//! event files. Pure: bytes are made here and stored elsewhere.

mod history;
mod tensorboard;

pub use history::{History, Step};
