//! `espalier bench train`: steps of training beside what the machine reaches by itself, and how fast conversations become
//! tokens with masks.
//!
//! Each case runs in a process of its own, which tells facts as lines of JSON: so memory is that of the case alone, and one
//! that takes too long is ended without those before it.

mod alone;
mod data;
mod summary;
mod words;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use clap::Args;
use espalier_train_worker::bench::{CPU, GPU};
use espalier_train_worker::config::DeviceChoice;
use espalier_train_worker::engine::Device;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStdout, Command};
use tokio::time::timeout;

pub use self::alone::alone;
use super::figures::Figures;
use crate::exit::Problem;
use crate::output::note;

/// The case that computes nothing.
const DATA: &str = "data";

/// Options of `bench train`.
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    /// cpu, or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// What is measured: on the CPU 256-lora, 256-full, 0.6b-lora, 0.6b-full and data; on a GPU 4m-4x1024, 4m-8192, 4b-2048,
    /// 4b-8192 and 4b-32768 [default: all of the device]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub cases: Vec<String>,
    /// Steps of a case that are timed, after one that warms up; the best counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Seconds after which a case is ended; what it told until then counts
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub limit_s: u64,
    /// Threads that compute [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// On a GPU: folders with NVRTC and cuBLASLt, where the loader does not find them
    #[arg(long, value_name = "FOLDER")]
    pub libraries: Vec<PathBuf>,
    /// On a GPU: folder that keeps compiled kernels [default: for this run]
    #[arg(long, value_name = "FOLDER")]
    pub kernels: Option<PathBuf>,
    /// On a GPU: memory that training may take, in GiB [default: all that is free]
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub memory: Option<u32>,
    /// Measures the one case in this process
    #[arg(long, hide = true)]
    pub alone: bool,
}

impl TrainArgs {
    fn threads(&self) -> usize {
        match self.threads {
            Some(threads) => threads as usize,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    fn device(&self) -> Result<Device, Problem> {
        Device::parse(&self.device, self.threads())
            .map_err(|error| Problem::refused(error.to_string()))
    }

    /// Names of what is to be measured, all of which the device has.
    fn chosen(&self) -> Result<Vec<&str>, Problem> {
        if let (Some(memory), Ok(DeviceChoice::Cpu)) = (self.memory, self.device.parse()) {
            let rule = format!("`memory` must be left out on cpu, got {memory}");
            return Err(Problem::refused(rule));
        }
        let known: Vec<&str> = match self.device.parse().map_err(Problem::refused)? {
            DeviceChoice::Cuda(_) => GPU.iter().map(|case| case.name).collect(),
            DeviceChoice::Cpu => CPU.iter().map(|case| case.name).chain([DATA]).collect(),
            DeviceChoice::Auto => {
                return Err(Problem::refused("`device` must be cpu or cuda:N, got auto"));
            }
        };
        if self.cases.is_empty() {
            return Ok(known);
        }
        for name in &self.cases {
            if !known.contains(&name.as_str()) {
                let known = known.join(", ");
                let device = &self.device;
                let rule = format!("`cases` must be of {known} on {device}, got {name:?}");
                return Err(Problem::refused(rule));
            }
        }
        Ok(self.cases.iter().map(String::as_str).collect())
    }
}

/// Measures one case after the other. One that fails or is ended leaves what it told, and the others go on.
pub async fn measure(args: &TrainArgs) -> Result<Figures, Problem> {
    let cases = args.chosen()?;
    let folder = tempfile::tempdir()?;
    let kernels = args.kernels.clone();
    let kernels = kernels.unwrap_or_else(|| folder.path().to_owned());
    let mut values = Map::new();
    let mut headlines = Vec::new();
    values.insert("device".to_owned(), json!(args.device));
    values.insert("memory_gib".to_owned(), json!(args.memory));
    for case in cases {
        note(format!("measuring: {case}"));
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "train", "--alone", "--device", &args.device]);
        command.args(["--cases", case, "--rounds", &args.rounds.to_string()]);
        command.args(["--threads", &args.threads().to_string()]);
        command.arg("--kernels").arg(&kernels);
        for folder in &args.libraries {
            command.arg("--libraries").arg(folder);
        }
        if let Some(memory) = args.memory {
            command.args(["--memory", &memory.to_string()]);
        }
        let facts = facts_of(case, command, Duration::from_secs(args.limit_s)).await?;
        headlines.extend(summary::headlines(case, &facts));
        values.insert(case.to_owned(), Value::Object(facts));
    }
    Ok(Figures {
        values: Value::Object(values),
        headlines,
    })
}

/// What a process tells until it ends, or until the limit is over. `ended` says how it did.
async fn facts_of(
    case: &str,
    mut command: Command,
    limit: Duration,
) -> Result<Map<String, Value>, Problem> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut facts = Map::new();
    let output = child.stdout.take();
    let told = timeout(limit, async {
        if let Some(output) = output {
            listen(case, output, &mut facts).await?;
        }
        Ok::<_, Problem>(child.wait().await?)
    });
    let ended = match told.await {
        Ok(status) => match status?.code() {
            Some(0) => "in good order".to_owned(),
            Some(code) => format!("with code {code}"),
            None => "by a signal".to_owned(),
        },
        Err(_) => {
            // Gone before the next begins, with the memory that it held.
            child.kill().await?;
            format!("after {} s, which was the limit", limit.as_secs())
        }
    };
    if ended != "in good order" {
        note(format!("{case} ended {ended}"));
    }
    facts.insert("ended".to_owned(), json!(ended));
    Ok(facts)
}

/// Puts facts beside those of earlier lines, or in their place, and shows each line as it comes.
async fn listen(
    case: &str,
    output: ChildStdout,
    facts: &mut Map<String, Value>,
) -> Result<(), Problem> {
    let began = Instant::now();
    let mut lines = BufReader::new(output).lines();
    while let Some(line) = lines.next_line().await? {
        let seconds = began.elapsed().as_secs_f64();
        note(format!("{case}, after {seconds:.1} s: {line}"));
        match serde_json::from_str(&line) {
            Ok(Value::Object(fields)) => facts.extend(fields),
            _ => return Err(Problem::failed(format!("{case} told no fact: {line}"))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: TrainArgs,
    }

    fn args(line: &[&str]) -> TrainArgs {
        let line = ["bench"].iter().chain(line);
        Line::try_parse_from(line).unwrap().args
    }

    #[test]
    fn cases_are_those_of_the_device() {
        let all = args(&[]);
        assert_eq!(all.chosen().unwrap().len(), CPU.len() + 1);
        let some = args(&["--cases", "data,256-full"]);
        assert_eq!(some.chosen().unwrap(), ["data", "256-full"]);
        let some = args(&["--device", "cuda:0", "--cases", "4b-2048"]);
        assert_eq!(some.chosen().unwrap(), ["4b-2048"]);
        let problem = args(&["--cases", "4b-2048"]).chosen().unwrap_err();
        assert!(problem.message.contains("got \"4b-2048\""), "{problem}");
        assert!(args(&["--device", "gpu"]).chosen().is_err());
        let problem = args(&["--memory", "72"]).chosen().unwrap_err();
        assert!(problem.message.contains("`memory`"), "{problem}");
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn facts_of_a_process_that_takes_too_long_stand() {
        let script = r#"echo '{"a": 1, "b": 1}'; echo '{"b": 2}'; exec sleep 600"#;
        let facts = facts_of("x", shell(script), Duration::from_millis(500)).await;
        let facts = facts.unwrap();
        assert_eq!((&facts["a"], &facts["b"]), (&json!(1), &json!(2)));
        assert!(facts["ended"].as_str().unwrap().contains("limit"));
    }

    #[tokio::test]
    async fn how_a_process_ended_is_told() {
        let limit = Duration::from_secs(30);
        let well = facts_of("x", shell("echo '{}'"), limit).await.unwrap();
        assert_eq!(well["ended"], "in good order");
        let badly = facts_of("x", shell("exit 3"), limit).await.unwrap();
        assert_eq!(badly["ended"], "with code 3");
        assert!(facts_of("x", shell("echo oops"), limit).await.is_err());
    }
}
