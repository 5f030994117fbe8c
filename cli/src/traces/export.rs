//! `espalier traces export`: one file a trace in the workshop's form, or whole traces as lines.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use espalier_core::id::BatchId;
use espalier_core::trace::Trace;
use espalier_runtime::traces::workshop;
use futures::StreamExt;
use serde_json::{Value, json};

use super::show::said;
use super::source::Found;
use super::{Filter, Place, Source};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::note;
use crate::progress;

/// Options of `traces export`.
#[derive(Args, Clone, Debug)]
pub struct Export {
    /// The batch
    #[arg(value_name = "BATCH")]
    pub batch: BatchId,
    /// `workshop`: {id, timestamp, model, messages, tools}; `jsonl`: everything
    #[arg(long, value_enum, default_value_t = Format::Workshop)]
    pub format: Format,
    /// Folder to write to, or `-` for lines on standard output
    #[arg(long, value_name = "DIR", default_value = "-")]
    pub out: PathBuf,
    /// What was recorded, whatever corrections say: nothing edited, nothing left out
    #[arg(long)]
    pub raw: bool,
    /// Which traces.
    #[command(flatten)]
    pub filter: Filter,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// What is written of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The workshop's files, as its notebooks and the Hugging Face Hub take them
    Workshop,
    /// The whole trace, schema version 1
    Jsonl,
}

impl Format {
    fn write(self, trace: &Trace, found: &Found) -> Value {
        match self {
            Self::Workshop => workshop::write(trace),
            Self::Jsonl if found.log.is_empty() => json!(trace),
            Self::Jsonl => {
                let mut value = json!(trace);
                value["curation"] = said(&found.curated);
                value
            }
        }
    }
}

/// How much was written, and how much was not meant to be.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    traces: u64,
    conversations: u64,
    left_out: u64,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Export) -> Outcome {
    let source = Source::open(context, &args.place).await?;
    let entries = source.choose(&args.batch, &args.filter).await?;
    let to_stdout = args.out.as_os_str() == "-";
    let mut target = Target::open(args)?;
    let bar = progress::things(entries.len() as u64, "exporting");
    let mut traces = std::pin::pin!(source.load_all(entries));
    let mut tally = Tally::default();
    while let Some(found) = traces.next().await {
        let found = found?;
        let found = if args.raw { found.trace.into() } else { found };
        add(&mut target, args.format, &found, &mut tally)?;
        bar.inc(1);
    }
    target.finish()?;
    bar.finish_and_clear();
    if to_stdout {
        note(told(tally));
    } else {
        context.out.show(
            || {
                json!({
                    "exported": tally.traces, "conversations": tally.conversations,
                    "left_out": tally.left_out, "out": args.out,
                })
            },
            || format!("{} to {}", told(tally), args.out.display()),
        )?;
    }
    Ok(Exit::Ok)
}

/// Writes each conversation of a trace, unless it is dropped or rejected.
fn add(
    target: &mut Target,
    format: Format,
    found: &Found,
    tally: &mut Tally,
) -> Result<(), Problem> {
    if !found.curated.standing.is_wanted() {
        tally.left_out += 1;
        return Ok(());
    }
    let job = &found.trace.header.job.job;
    for (n, trace) in found.curated.traces(&found.trace).iter().enumerate() {
        // No name of a job holds a `#`, so that none meets the second part of another.
        let name = match n {
            0 => job.to_string(),
            n => format!("{job}#{}", n + 1),
        };
        target.write(&name, &format.write(trace, found))?;
        tally.conversations += 1;
    }
    tally.traces += 1;
    Ok(())
}

fn told(tally: Tally) -> String {
    let mut text = format!("exported {} traces", tally.traces);
    if tally.conversations > tally.traces {
        text.push_str(&format!(" as {} conversations", tally.conversations));
    }
    if tally.left_out > 0 {
        text.push_str(&format!(
            ", left out {} that are dropped or rejected",
            tally.left_out
        ));
    }
    text
}

/// Where lines or files go.
enum Target {
    Lines(Box<dyn Write>),
    Files(PathBuf),
}

impl Target {
    fn open(args: &Export) -> Result<Self, Problem> {
        if args.out.as_os_str() == "-" {
            return Ok(Self::Lines(Box::new(std::io::stdout().lock())));
        }
        let fail = |error: std::io::Error| {
            Problem::failed(format!("cannot write to {}: {error}", args.out.display()))
        };
        std::fs::create_dir_all(&args.out).map_err(fail)?;
        match args.format {
            Format::Workshop => Ok(Self::Files(args.out.clone())),
            Format::Jsonl => {
                let file =
                    File::create(args.out.join(format!("{}.jsonl", args.batch))).map_err(fail)?;
                Ok(Self::Lines(Box::new(BufWriter::new(file))))
            }
        }
    }

    fn write(&mut self, name: &str, value: &Value) -> Result<(), Problem> {
        match self {
            Self::Lines(lines) => Ok(writeln!(lines, "{value}")?),
            Self::Files(folder) => write_file(&folder.join(format!("{name}.json")), value),
        }
    }

    fn finish(self) -> Result<(), Problem> {
        match self {
            Self::Lines(mut lines) => Ok(lines.flush()?),
            Self::Files(_) => Ok(()),
        }
    }
}

fn write_file(path: &Path, value: &Value) -> Result<(), Problem> {
    std::fs::write(path, format!("{value:#}\n"))
        .map_err(|error| Problem::failed(format!("cannot write {}: {error}", path.display())))
}
