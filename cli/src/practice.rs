//! `espalier practice`: the practice site and its tasks.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use espalier_practice::site;
use espalier_practice::tasks::{DEFAULT_SEED, Kind, Split, generate_of};
use espalier_runtime::shutdown::Shutdown;
use serde_json::json;
use tokio::net::TcpListener;

use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::note;

/// How long requests at hand may take once the site is told to stop.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// What to do.
#[derive(Subcommand, Clone, Debug)]
pub enum Practice {
    /// Serves the site until it is told to stop
    Site(Site),
    /// Writes tasks with known answers, one job a line, for `espalier submit --var site=URL`
    Tasks(TaskArgs),
}

/// Options of `practice site`.
#[derive(Args, Clone, Debug)]
pub struct Site {
    /// Address to listen on
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:4310")]
    pub listen: String,
    /// What the site is made from; tasks need the same
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// File that gets the site's address once it serves
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub ready_file: Option<PathBuf>,
}

/// Options of `practice tasks`.
#[derive(Args, Clone, Debug)]
pub struct TaskArgs {
    /// What the site is made from
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 48)]
    pub count: usize,
    /// `train` or `eval`; the two never overlap
    #[arg(long, value_name = "SPLIT", default_value = "train")]
    pub split: Split,
    /// Only tasks of this kind, such as shop_price or depot_find; may be given several times [default: all but the depot's]
    #[arg(long = "kind", value_name = "KIND")]
    pub kinds: Vec<Kind>,
    /// File to write [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Runs the command.
pub async fn run(context: &Context, command: &Practice) -> Outcome {
    match command {
        Practice::Site(args) => serve(context, args).await,
        Practice::Tasks(args) => write_tasks(context, args),
    }
}

async fn serve(context: &Context, args: &Site) -> Outcome {
    let cannot = |error: std::io::Error| {
        Problem::refused(format!("cannot listen on {}: {error}", args.listen))
            .fix("choose another address with --listen; port 0 takes a free one")
    };
    let listener = TcpListener::bind(&args.listen).await.map_err(cannot)?;
    let url = format!("http://{}", listener.local_addr()?);
    let shutdown = Shutdown::from_signals(DRAIN_LIMIT)?;
    if let Some(file) = &args.ready_file {
        std::fs::write(file, &url).map_err(|error| {
            Problem::failed(format!("cannot write {}: {error}", file.display()))
        })?;
    }
    // One line of JSON or text, so that a script knows the address before it goes on.
    if context.out.json {
        context.out.event(&json!({"url": url, "seed": args.seed}))?;
    } else {
        context.out.line(&url)?;
    }
    note(format!(
        "next: espalier submit tasks.jsonl --var site={url} --watch"
    ));
    let draining = shutdown.clone();
    let serving = site::serve(
        listener,
        args.seed,
        async move { draining.draining().await },
    );
    tokio::select! {
        served = serving => served?,
        () = shutdown.aborted() => {}
    }
    Ok(Exit::Ok)
}

fn write_tasks(context: &Context, args: &TaskArgs) -> Outcome {
    let kinds = match args.kinds.as_slice() {
        [] => &Kind::ALL[..],
        kinds => kinds,
    };
    let tasks = generate_of(kinds, args.seed, args.count, args.split);
    match &args.out {
        Some(path) => {
            let text: String = tasks.iter().map(|task| format!("{task}\n")).collect();
            std::fs::write(path, text).map_err(|error| {
                Problem::failed(format!("cannot write {}: {error}", path.display()))
            })?;
            context.out.show(
                || json!({"file": path, "tasks": tasks.len()}),
                || format!("wrote {} tasks to {}", tasks.len(), path.display()),
            )?;
        }
        None => {
            for task in &tasks {
                context.out.event(task)?;
            }
        }
    }
    if tasks.len() < args.count {
        return Err(Problem::failed(format!(
            "the site has only {} such tasks",
            tasks.len()
        )));
    }
    Ok(Exit::Ok)
}
