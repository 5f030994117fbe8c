//! `espalier runpod`: workers in pods of RunPod without a scaler, for as long as somebody wants them.
//!
//! A pod says in its environment under which name it was started, as those of a coordinator's scaler do: `status` and `down` mean
//! both, so that what a coordinator left behind can be ended too.

mod args;
mod down;
mod status;
#[cfg(test)]
mod tests;
mod up;

use std::time::Duration;

use clap::{Args, Subcommand};
use espalier_coordinator::scaler::ProviderError;
use espalier_coordinator::scaler::runpod::config::URL_DEFAULT;
use espalier_coordinator::scaler::runpod::{ApiError, Client};
use espalier_runtime::backoff::Backoff;
use espalier_runtime::config::Secret;
use espalier_runtime::telemetry::error_chain;

use crate::context::Context;
use crate::exit::{Outcome, Problem};
use crate::output::note;

/// The variable with the key of the account.
const KEY_VARIABLE: &str = "RUNPOD_API_KEY";
/// The name of pods for which nobody gave one.
const NAME_DEFAULT: &str = "cli";
/// Tries of a request while RunPod fails.
const TRIES_MAX: u32 = 5;
/// The waits between them.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_secs(1),
    max: Duration::from_secs(15),
};
/// Waits that RunPod may ask for before the command gives up.
const WAITS_MAX: u32 = 20;

/// `espalier runpod …`.
#[derive(Subcommand, Debug)]
pub enum RunpodCommand {
    /// Start pods with workers, and wait until they run; what is there already stays
    #[command(after_help = UP_HELP)]
    Up(Box<args::Up>),
    /// List pods of workers, of coordinators' scalers too, with what they cost
    Status(status::Status),
    /// End the pods of a name
    Down(down::Down),
}

/// The account's API.
#[derive(Args, Clone, Debug)]
pub struct Account {
    /// RunPod's API; the key goes in RUNPOD_API_KEY
    #[arg(long, value_name = "URL", env = "RUNPOD_API_URL", default_value = URL_DEFAULT, hide_short_help = true)]
    pub api_url: String,
}

impl Account {
    /// The key of this terminal.
    fn key(context: &Context) -> Result<Secret, Problem> {
        let key = context.environment.get(KEY_VARIABLE);
        let key = key.map(|key| key.trim()).filter(|key| !key.is_empty());
        key.map(Secret::new).ok_or_else(|| {
            Problem::refused("there is no key for RunPod")
                .fix("set RUNPOD_API_KEY to a key of the account that may read and write pods")
        })
    }

    fn client(&self, context: &Context) -> Result<Client, Problem> {
        Ok(Client::new(&self.api_url, &Self::key(context)?)?)
    }
}

const UP_HELP: &str = "\
  export RUNPOD_API_KEY=… ESPALIER_TRAIN_WORKER_TOKEN=… AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…
  espalier runpod up train --image registry.example/espalier/train-worker:0.1.0 \\
    --gpu 'NVIDIA RTX A5000' --gpu 'NVIDIA L4' --max-price 0.40 \\
    --cuda-min 13.0 --env ESPALIER_TRAIN_WORKER_COORDINATOR_URL=https://jobs.example:7411 \\
    --env ESPALIER_TRAIN_WORKER_COORDINATOR_CA=/etc/ssl/certs/ca-certificates.crt \\
    --env ESPALIER_TRAIN_WORKER_STORE_URL=s3://bucket/espalier \\
    --env ESPALIER_TRAIN_WORKER_TOKEN --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY

Each pod gets the first --gpu that RunPod has for at most --max-price. Pods run, and cost, until `espalier runpod down` ends
them. The same command again starts those that are missing. Ctrl-C leaves those that there are.
Exit code 1: not all pods run; those that there are stay.";

/// Runs a command.
pub async fn run(context: &Context, command: &RunpodCommand) -> Outcome {
    match command {
        RunpodCommand::Up(args) => up::run(context, args).await,
        RunpodCommand::Status(args) => status::run(context, args).await,
        RunpodCommand::Down(args) => down::run(context, args).await,
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        let problem = Self::failed(error_chain(&error));
        match error {
            ApiError::Refused { status: 401, .. } => {
                problem.fix("set RUNPOD_API_KEY to a key of the account")
            }
            ApiError::Refused { status: 402, .. } => problem.fix("add credit to the account"),
            ApiError::Refused { status: 403, .. } => {
                problem.fix("give the key the right to read and write pods")
            }
            ApiError::RateLimited { .. } | ApiError::Unreachable { .. } | ApiError::Late { .. } => {
                problem.fix("try again: the same command does nothing twice")
            }
            _ => problem,
        }
    }
}

impl From<ProviderError> for Problem {
    fn from(error: ProviderError) -> Self {
        let problem = Self::failed(error.to_string());
        match error {
            ProviderError::NoCapacity(_) => {
                problem.fix("name another --gpu or a higher --max-price, or try again later")
            }
            ProviderError::RateLimited { .. } | ProviderError::Unavailable(_) => {
                problem.fix("try again: the same command does nothing twice")
            }
            ProviderError::Refused(_) => problem,
        }
    }
}

/// An error that may pass.
trait Passing: Into<Problem> {
    /// What to do about it.
    fn remedy(&self) -> Remedy;
}

/// What may be done about an error.
enum Remedy {
    /// To wait for so long, and to ask again.
    Wait(Duration),
    /// To ask again soon, a few times.
    Again,
    /// Nothing.
    None,
}

impl Passing for ApiError {
    fn remedy(&self) -> Remedy {
        match self {
            Self::RateLimited { retry_after, .. } => Remedy::Wait(*retry_after),
            error if error.passes() => Remedy::Again,
            _ => Remedy::None,
        }
    }
}

impl Passing for ProviderError {
    fn remedy(&self) -> Remedy {
        match self {
            Self::RateLimited { retry_after } => Remedy::Wait(*retry_after),
            Self::Unavailable(_) => Remedy::Again,
            Self::NoCapacity(_) | Self::Refused(_) => Remedy::None,
        }
    }
}

/// Does `once` again while RunPod asks to wait, or fails. It does nothing twice.
async fn patiently<T, E, F>(once: impl Fn() -> F) -> Result<T, Problem>
where
    F: Future<Output = Result<T, E>>,
    E: Passing,
{
    let (mut failures, mut waits) = (0, 0);
    loop {
        let error = match once().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        match error.remedy() {
            Remedy::Wait(asked) if waits < WAITS_MAX => {
                waits += 1;
                note(format!(
                    "RunPod asks to wait for {} s",
                    asked.as_secs_f64().ceil()
                ));
                tokio::time::sleep(asked).await;
            }
            Remedy::Again if failures + 1 < TRIES_MAX => {
                failures += 1;
                tokio::time::sleep(BACKOFF.jittered(failures)).await;
            }
            _ => return Err(error.into()),
        }
    }
}
