//! The frame of a process: its configuration before anything else, telemetry around what it does, signals that drain it, and
//! an exit code that says how it ended.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use crate::shutdown::Shutdown;
use crate::tasks;
use crate::telemetry::{self, TelemetryConfig};

/// A configuration that cannot be used, as `sysexits.h` numbers it.
const EXIT_USAGE: u8 = 64;
/// How long telemetry may take to leave at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// The variables that any child inherits. Not the rest: what a process is told holds its secrets.
pub const INHERITED: [&str; 20] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LC_ALL",
    "TZ",
    "TERM",
    "DISPLAY",
    "XDG_RUNTIME_DIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "NODE_EXTRA_CA_CERTS",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
];

/// Why a process did not start, or did not end in order.
pub type Failure = Box<dyn Error + Send + Sync>;

/// What a process is told before it starts.
#[derive(Debug)]
pub struct Told<C> {
    /// All of it, checked.
    pub config: C,
    /// Where logs, traces and metrics go.
    pub telemetry: TelemetryConfig,
    /// How long it may take to end once it drains, by a signal or by itself.
    pub drain_limit: Duration,
}

/// The signals that end a process.
#[derive(Debug, thiserror::Error)]
#[error("signals cannot be listened to")]
struct Signals(#[source] std::io::Error);

/// Runs the process `name`: reads what it is told, and serves until it is done or drained. What goes wrong is said on
/// standard error; the exit code is 64 where it was the configuration.
pub fn run<C, L, F, E>(
    name: &'static str,
    load: impl FnOnce() -> Result<Told<C>, L>,
    serve: impl FnOnce(C, Shutdown) -> F,
) -> ExitCode
where
    L: Into<Failure>,
    F: Future<Output = Result<(), E>>,
    E: Into<Failure>,
{
    let told = match load() {
        Ok(told) => told,
        Err(error) => {
            say(name, error.into());
            return ExitCode::from(EXIT_USAGE);
        }
    };
    // Boxed: the states of a whole process are too much for a stack.
    let served = tasks::block_on(Box::pin(serve_told(name, told, serve)));
    match served.map_err(Failure::from).flatten() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(name, error);
            ExitCode::FAILURE
        }
    }
}

async fn serve_told<C, F, E>(
    name: &'static str,
    told: Told<C>,
    serve: impl FnOnce(C, Shutdown) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), E>>,
    E: Into<Failure>,
{
    let telemetry = telemetry::init(&told.telemetry, name)?;
    let served = match Shutdown::from_signals(told.drain_limit) {
        Ok(shutdown) => Box::pin(serve(told.config, shutdown))
            .await
            .map_err(E::into),
        Err(error) => Err(Signals(error).into()),
    };
    telemetry.shutdown(FLUSH_LIMIT).await;
    served
}

fn say(name: &str, error: Failure) {
    eprintln!("{name}: {}", telemetry::error_chain(&*error));
}
