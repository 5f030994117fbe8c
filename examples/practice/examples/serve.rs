//! Serves the practice site of seed 7 on the port that is given, for a look at it: `cargo run --example serve 4310`.

use espalier_practice::{site, tasks::DEFAULT_SEED};

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let port = std::env::args().nth(1).unwrap_or_else(|| "4310".into());
    let listener = tokio::net::TcpListener::bind(format!("127.0.0.1:{port}")).await?;
    site::serve(listener, DEFAULT_SEED, std::future::pending()).await
}
