//! The `espalier` command: a client of the public API, and `up`, which runs everything in one process.
//!
//! One module a group of commands. A command takes a [`context::Context`] and its options, writes results to standard
//! output, and returns an exit code or a problem; nothing here ends the process. What can be decided without IO
//! (parsing, tables, reports) is in plain functions with tests beside them.

mod adapters;
mod admin;
mod args;
mod bench;
mod chat;
mod client;
mod context;
mod dataset;
mod doctor;
mod evaluate;
mod exit;
mod expand;
mod generate;
mod hardware;
mod hub;
mod jobs;
mod json;
mod lineage;
mod names;
mod output;
mod practice;
mod progress;
mod questions;
mod render;
mod rollout_args;
mod run;
mod runpod;
#[cfg(test)]
mod scenarios;
mod servers;
mod submit;
mod top;
mod traces;
mod train;
mod up;
mod uploads;
mod waiting;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use espalier_runtime::config;

use args::{Cli, Command};
use context::Context;
use exit::{Outcome, Problem};
use output::note;

/// Reads arguments and environment, runs the command, and says how it ended.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too; clap knows which is which.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let json = cli.global.json;
    match start(cli) {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(problem) => {
            if json && !problem.message.is_empty() {
                note(problem.to_json().to_string());
            } else if !problem.message.is_empty() {
                note(problem.to_string());
            }
            ExitCode::from(problem.exit as u8)
        }
    }
}

fn start(cli: Cli) -> Outcome {
    let environment = config::environment()?;
    let context = Context::new(cli.global, environment);
    let ran = espalier_runtime::tasks::block_on(Box::pin(perform(&context, &cli.command)));
    ran.map_err(|error| Problem::failed(format!("cannot start: {error}")))?
}

async fn perform(context: &Context, command: &Command) -> Outcome {
    match command {
        Command::Up(args) => up::run(context, args).await,
        Command::Submit(args) => submit::run(context, args).await,
        Command::Generate(args) => generate::run(context, args).await,
        Command::Train(args) => train::run(context, args).await,
        Command::Evaluate(args) => evaluate::run(context, args).await,
        Command::Run(args) => run::run(context, args).await,
        Command::Watch(args) => watch::run(context, args).await,
        Command::Top(args) => top::run(context, args).await,
        Command::Jobs(args) => jobs::list(context, args).await,
        Command::Job(command) => jobs::one(context, command).await,
        Command::Batches(args) => jobs::batches(context, args).await,
        Command::Cancel(args) => jobs::cancel(context, args).await,
        Command::Retry(args) => jobs::retry(context, args).await,
        Command::Questions(args) => questions::list(context, args).await,
        Command::Answer(args) => questions::answer(context, args).await,
        Command::Workers => admin::workers(context).await,
        Command::Queues => admin::queues(context).await,
        Command::Drain(args) => admin::drain(context, args).await,
        Command::Traces(command) => traces::run(context, command).await,
        Command::Dataset(command) => dataset::run(context, command).await,
        Command::Adapters(command) => adapters::run(context, command).await,
        Command::Lineage(args) => lineage::run(context, args).await,
        Command::Practice(command) => practice::run(context, command).await,
        Command::Runpod(command) => runpod::run(context, command).await,
        Command::Chat(args) => chat::run(context, args).await,
        Command::Bench(command) => bench::run(context, command).await,
        Command::Doctor(args) => doctor::run(context, args).await,
    }
}
