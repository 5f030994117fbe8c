//! The coordinator as its clients and workers see it: in this process, over real gRPC.

mod access;
mod jobs;
mod questions;
mod support;
mod tls;
mod watch;
mod worker;
