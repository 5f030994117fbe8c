//! Compiles the protos without protoc, and writes the descriptor set that reflection serves: that of our own API, not of
//! KEDA's, which has a port of its own.

use std::path::PathBuf;

use prost::Message;

const PROTOS: [&str; 5] = [
    "espalier/v1/spec.proto",
    "espalier/v1/jobs.proto",
    "espalier/v1/models.proto",
    "espalier/v1/worker.proto",
    "espalier/v1/admin.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=espalier");
    println!("cargo:rerun-if-changed=keda");
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("espalier.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .compile_fds(descriptors)?;
    let keda = protox::compile(["keda/externalscaler.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(keda)?;
    Ok(())
}
