//! The coordinator as its clients and workers see it: in this process, over real gRPC.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail a test by panicking"
)]

mod access;
mod jobs;
mod moving;
mod questions;
mod scaler;
mod shared_queue;
mod support;
mod tls;
mod watch;
mod worker;
