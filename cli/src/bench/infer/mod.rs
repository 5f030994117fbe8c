//! `espalier bench infer`: our model server beside llama.cpp's on the same cores, with the same random weights of
//! Qwen3-0.6B's exact shape, asked the same over HTTP by this process.
//!
//! The servers are visited in turns and never run at once. Before figures count, greedy answers of both are compared.
//! `--device cuda:N` measures the engine on a GPU instead.

mod bandwidth;
mod check;
mod gpu;
mod overhead;
mod server;
mod summary;
mod visit;
mod wire;

use std::path::PathBuf;

use clap::Args;
use espalier_infer_worker::config::Device;
use espalier_runtime::tasks::blocking;
use serde_json::{Map, Value, json};

use self::server::{Form, Kind, Setup};
use self::summary::Visits;
use super::figures::Figures;
use crate::exit::Problem;
use crate::output::note;

/// Options of `bench infer`.
#[derive(Args, Clone, Debug)]
pub struct InferArgs {
    /// cpu, or cuda:N for the engine on a GPU
    #[arg(long, default_value = "cpu", value_parser = device)]
    pub device: Device,
    /// The folder with the models that `make setup-bench` writes
    #[arg(
        long,
        value_name = "FOLDER",
        default_value = "target/bench/llama/models"
    )]
    pub models: PathBuf,
    /// llama.cpp's server; without it ours is measured alone
    #[arg(long, value_name = "FILE")]
    pub llama: Option<PathBuf>,
    /// Our server's binary [default: beside this program]
    #[arg(long, value_name = "FILE")]
    pub worker: Option<PathBuf>,
    /// How weights are held
    #[arg(long, value_enum, value_name = "FORM", value_delimiter = ',', default_values = ["bf16", "q8"])]
    pub forms: Vec<Form>,
    /// Threads of each server [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Visits of each server; on a GPU, runs of each workload
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Options for a GPU.
    #[command(flatten)]
    pub gpu: gpu::GpuArgs,
}

fn device(text: &str) -> Result<Device, String> {
    match text.parse()? {
        Device::Auto => Err("must be cpu or cuda:N".to_owned()),
        device => Ok(device),
    }
}

/// Measures on the device that was asked for.
pub async fn measure(args: &InferArgs) -> Result<Figures, Problem> {
    if let Device::Cuda(ordinal) = args.device {
        return gpu::measure(ordinal, &args.gpu, args.rounds).await;
    }
    let folder = tempfile::tempdir()?;
    let bench = Bench {
        args,
        threads: match args.threads {
            Some(threads) => threads as usize,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        },
        worker: match &args.worker {
            Some(file) => file.clone(),
            None => std::env::current_exe()?.with_file_name("espalier-infer-worker"),
        },
        logs: folder.path().to_owned(),
    };
    let measured = bench.all().await;
    if measured.is_err() {
        // What the servers said is worth keeping only where something went wrong.
        note(format!("logs: {}", folder.keep().display()));
    }
    measured
}

struct Bench<'a> {
    args: &'a InferArgs,
    threads: usize,
    worker: PathBuf,
    logs: PathBuf,
}

impl Bench<'_> {
    async fn all(&self) -> Result<Figures, Problem> {
        let mut values = Map::new();
        let mut headlines = Vec::new();
        values.insert("threads".to_owned(), json!(self.threads));
        for form in &self.args.forms {
            let (of_form, more) = self.form(*form).await?;
            values.insert(form.name().to_owned(), of_form);
            headlines.extend(more);
        }
        note("measuring: serving beyond the executor");
        let tiny = self.setup("tiny", Form::Bf16)?;
        let overhead = overhead::measure(&tiny).await?;
        values.insert("overhead".to_owned(), overhead.values);
        headlines.extend(overhead.headlines);
        Ok(Figures {
            values: Value::Object(values),
            headlines,
        })
    }

    fn setup(&self, model: &str, form: Form) -> Result<Setup, Problem> {
        let model = self.args.models.join(model);
        if !model.join("espalier/config.json").is_file() {
            let problem = Problem::refused(format!("there is no model in {}", model.display()));
            return Err(
                problem.fix("write it with `make setup-bench`, or name its folder with `--models`")
            );
        }
        Ok(Setup {
            worker: self.worker.clone(),
            llama: self.args.llama.clone().unwrap_or_default(),
            model,
            form,
            threads: self.threads,
            folder: self.logs.clone(),
            verbose: false,
        })
    }

    /// All visits with one form of weights.
    async fn form(&self, form: Form) -> Result<(Value, Vec<super::Headline>), Problem> {
        let setup = self.setup("0.6b", form)?;
        let mut visits = Visits::new(form);
        let mut kinds = vec![Kind::Espalier];
        if self.args.llama.is_some() {
            note(format!("{}: comparing answers", form.name()));
            visits.agreement = Some(check::check(&setup).await?);
            kinds.push(Kind::Llama);
        }
        for round in 0..self.args.rounds {
            let threads = self.threads;
            let rate = blocking("bench.bandwidth", move || bandwidth::read_per_s(threads)).await;
            visits
                .reads_per_s
                .push(rate.map_err(|error| Problem::failed(error.to_string()))?);
            for kind in &kinds {
                let (name, rounds) = (form.name(), self.args.rounds);
                note(format!(
                    "{name}: visiting {kind:?}, {} of {rounds}",
                    round + 1
                ));
                let (server, visit) = visit::visit(&setup, *kind, u64::from(round)).await?;
                visits.of(*kind).push(visit);
                server.end().await?;
            }
        }
        Ok((visits.to_json(), visits.headlines()))
    }
}
