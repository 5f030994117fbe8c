//! The public API of Espalier: the generated types of `espalier.v1`, and their conversion to and from domain types. Beside it
//! the API by which KEDA asks, which is KEDA's.

pub mod convert;
pub mod status;

/// The generated code. Every item is documented in the `.proto` files.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::large_futures,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("espalier.v1");
}

/// What KEDA asks, generated as [`v1`] is.
#[allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]
pub mod keda {
    tonic::include_proto!("externalscaler");
}

/// Descriptors of all services, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/espalier.v1.bin"));

/// Longest message that either side accepts, in bytes: a chunk of jobs at its largest, with room.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
