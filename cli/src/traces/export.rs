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
    fn write(self, trace: &Trace) -> Value {
        match self {
            Self::Workshop => workshop::write(trace),
            Self::Jsonl => json!(trace),
        }
    }
}

/// Runs the command.
pub async fn run(context: &Context, args: &Export) -> Outcome {
    let source = Source::open(context, &args.place).await?;
    let entries = source.choose(&args.batch, &args.filter).await?;
    let to_stdout = args.out.as_os_str() == "-";
    let mut target = Target::open(args)?;
    let bar = progress::things(entries.len() as u64, "exporting");
    let mut traces = std::pin::pin!(source.load_all(entries));
    let mut written = 0_u64;
    while let Some(trace) = traces.next().await {
        let trace = trace?;
        target.write(&trace.header.job.job, &args.format.write(&trace))?;
        written += 1;
        bar.set_position(written);
    }
    target.finish()?;
    bar.finish_and_clear();
    if to_stdout {
        note(format!("exported {written} traces"));
    } else {
        context.out.show(
            || json!({"exported": written, "out": args.out}),
            || format!("exported {written} traces to {}", args.out.display()),
        )?;
    }
    Ok(Exit::Ok)
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

    fn write(&mut self, job: &espalier_core::id::JobId, value: &Value) -> Result<(), Problem> {
        match self {
            Self::Lines(lines) => Ok(writeln!(lines, "{value}")?),
            Self::Files(folder) => write_file(&folder.join(format!("{job}.json")), value),
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
