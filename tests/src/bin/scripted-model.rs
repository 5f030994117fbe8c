//! The scripted model as a process of its own.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use espalier_tests::scripted_model::{Config, serve};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// An OpenAI-compatible server that plays rules where a model would think.
#[derive(Parser)]
struct Arguments {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Decides which turns go wrong.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Share of turns that go wrong, 0 to 1.
    #[arg(long, default_value_t = 0.15)]
    mistakes: f64,
    /// Time to pretend to think before each answer.
    #[arg(long, default_value_t = 0)]
    think_ms: u64,
    /// File that gets the server's address once it listens.
    #[arg(long)]
    ready_file: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    anyhow::ensure!(
        (0.0..=1.0).contains(&arguments.mistakes),
        "`--mistakes` must be in [0, 1], got {}",
        arguments.mistakes
    );
    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let shutdown = terminated().context("cannot listen for signals")?;
    let url = format!("http://{}", listener.local_addr()?);
    if let Some(path) = &arguments.ready_file {
        std::fs::write(path, &url).with_context(|| format!("cannot write {}", path.display()))?;
    }
    eprintln!("listening on {url}");
    let config = Config {
        seed: arguments.seed,
        mistakes: arguments.mistakes,
        think_ms: arguments.think_ms,
    };
    serve(listener, config, shutdown).await?;
    Ok(())
}

fn terminated() -> std::io::Result<impl Future<Output = ()>> {
    let (mut term, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
