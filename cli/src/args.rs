//! The command line as a whole. Options of a command stand in the command's own module.

use clap::{Parser, Subcommand};

use crate::adapters::AdaptersCommand;
use crate::bench::Bench;
use crate::context::Global;
use crate::dataset::DatasetCommand;
use crate::jobs::JobCommand;
use crate::practice::Practice;
use crate::runpod::RunpodCommand;
use crate::traces::TracesCommand;
use crate::{
    admin, chat, doctor, evaluate, generate, jobs, lineage, questions, run, submit, top, train, up,
    watch,
};

const ABOUT: &str = "Run tool-using agents in real browsers, many at once, and keep verified traces of what they do";

const LONG_ABOUT: &str = "\
Run tool-using agents in real browsers, many at once, and keep verified traces of what they do.

  espalier up --model-url http://localhost:8000/v1 --model Qwen/Qwen3-4B
      everything on this machine
  espalier submit tasks.jsonl --watch
      a batch of jobs, to its end
  espalier traces export BATCH --format workshop --min-reward 1 --out DIR
      the good ones, for training";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  jobs are dead or lost, or a check failed
  2  the command line, a file or some jobs were refused (the other jobs were accepted)
  3  the coordinator cannot be reached, or does not accept the token

Environment:
  ESPALIER_URL, ESPALIER_TOKEN  a coordinator that is not the local `espalier up`
  ESPALIER_DATA_DIR             folder of the local `espalier up`
  ESPALIER_PROJECT              project whose traces are meant [default: default]
  ESPALIER_UP_…                 keys of the file of `up` and `chat`: `slots` is ESPALIER_UP_SLOTS
  ESPALIER_PLAYWRIGHT_DIR       folder that holds node_modules/@playwright/mcp, for `up` and `chat`
  RUNPOD_API_KEY                the account of RunPod, for `runpod`
  HF_TOKEN, HF_ENDPOINT, …      the Hugging Face hub, as its own clients read them
  NO_COLOR                      no colours";

/// The command line.
#[derive(Parser, Debug)]
#[command(name = "espalier", version, about = ABOUT, long_about = LONG_ABOUT, after_help = EXIT_CODES)]
#[command(propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run everything on this machine: coordinator, worker, queue and store in one process
    #[command(after_help = UP_HELP)]
    Up(Box<up::Up>),
    /// Turn a file of jobs into a batch; jobs that break a rule are refused one by one
    #[command(after_help = SUBMIT_HELP)]
    Submit(submit::Submit),
    /// Have a file of requests answered by a served model, and get a file of answers
    #[command(after_help = GENERATE_HELP)]
    Generate(generate::Generate),
    /// Train a model on a data set, and publish the adapter
    #[command(after_help = TRAIN_HELP)]
    Train(Box<train::Train>),
    /// Let two models try the same tasks, and report what differs
    #[command(after_help = EVALUATE_HELP)]
    Evaluate(Box<evaluate::Evaluate>),
    /// Roll out, train, evaluate and publish as one pipeline that goes on where it was; round after round
    #[command(after_help = RUN_HELP)]
    Run(run::Run),
    /// Follow a batch to its end, then what was solved, what failed, and why; without one, watch the whole system
    Watch(watch::Watch),
    /// Watch the whole system on a screen with keys: queues, batches, pipelines, workers, models, what an hour costs
    Top(top::Top),
    /// List the jobs of a batch
    Jobs(jobs::Jobs),
    /// Show, cancel or retry one job
    #[command(subcommand)]
    Job(JobCommand),
    /// List batches, newest first
    Batches(jobs::Batches),
    /// Cancel a batch, a job, or all jobs with a label
    Cancel(jobs::Cancel),
    /// Put dead jobs of a batch back into the queue with fresh budgets
    Retry(jobs::Retry),
    /// List the questions of rollouts about tools under `ask`
    Questions(questions::Questions),
    /// Answer one of them
    Answer(questions::Answer),
    /// List connected workers
    Workers,
    /// Show how much waits and runs, by project
    Queues,
    /// Let a worker finish what it has and take no more
    Drain(admin::Drain),
    /// List, read, correct, export, import and judge traces again
    #[command(subcommand)]
    Traces(TracesCommand),
    /// Build data sets of traces and files, look at them, push them to the Hugging Face hub
    #[command(subcommand)]
    Dataset(DatasetCommand),
    /// List what was trained, pull it as a folder, push it to the Hugging Face hub, choose the version that is served
    #[command(subcommand)]
    Adapters(AdaptersCommand),
    /// Walk from an adapter to its data set, traces, jobs and model, and verify each digest
    Lineage(lineage::Lineage),
    /// The practice site, and tasks on it with known answers
    #[command(subcommand)]
    Practice(Practice),
    /// Workers in pods of RunPod: start them, see what they cost, end them
    #[command(subcommand)]
    Runpod(RunpodCommand),
    /// Talk to an agent with tools in this terminal; it asks before each call and records a trace
    #[command(after_help = CHAT_HELP)]
    Chat(Box<chat::Chat>),
    /// Measure this machine; figures as JSON with --json
    #[command(subcommand)]
    Bench(Bench),
    /// Check this machine and what it is connected to; each fault comes with its fix
    Doctor(doctor::Doctor),
}

const TRAIN_HELP: &str = "\
  espalier train --base Qwen/Qwen3-0.6B --dataset shop@v1 --name shop
  espalier train --base Qwen/Qwen3-0.6B --dataset shop@v1 --name shop --config lora.toml --set epochs=2 --plan

lora.toml, of which every key is optional:
  method = \"lora\"          # or \"full\"
  rank = 32
  alpha = 16
  rslora = true
  max_length = 32768
  batch = 1
  accumulation = 4
  epochs = 1               # or max_steps
  lr = 2e-4
  schedule = \"constant\"    # or \"linear\", \"cosine\"
  optimizer = \"adamw_8bit\" # or \"adamw\"
  eval_every = 50
  checkpoint_every = 50

Ctrl-C leaves the training running; `espalier train` with the same --batch goes on watching it.";

const EVALUATE_HELP: &str = "\
  espalier evaluate --model Qwen/Qwen3-0.6B --model shop --tasks tasks.jsonl --split eval --samples 3 --out report

Each task becomes rollouts of both models, alike but for the model, and a comparison that waits for them, in one batch. Hints
are left out. A task that breaks a rule is refused with its line, and the others go on. Ctrl-C leaves the batch running;
the same command with the same --batch goes on watching it.
Exit code 2: some tasks were refused. 1: jobs are dead, or, with --gate, the gate does not pass.";

const RUN_HELP: &str = "\
  espalier run improve.toml

improve.toml, of which `name`, `base` and `tasks` are needed:
  name = \"shop\"              # of the pipeline, its adapter and its data set
  base = \"Qwen/Qwen3-4B\"     # what is trained
  model = \"Qwen/Qwen3-4B\"    # what endpoints call it [default: base]
  rounds = 1
  [tasks]
  train = \"tasks.jsonl\"      # those of split \"train\"; paths are seen from this file
  eval = \"tasks.jsonl\"       # those of split \"eval\"
  vars = { site = \"http://127.0.0.1:4310\" }
  [probe]                     # drops training tasks that are always solved [default: no probe]
  samples = 4
  [rollouts]
  samples = 4
  hints = true
  sampling = { temperature = 0.7 }
  [dataset]                   # fields of a curation
  where = \"solved\"
  [train]                     # settings of a training
  rank = 32
  [serve]
  deadline_s = 1800
  [evaluate]
  samples = 1
  sampling = { temperature = 0.0 }
  prices = { prompt = 0.5, completion = 1.5 }    # of a million tokens
  [gate]
  min_difference = -0.02
  min_tasks = 30
  [publish]
  enabled = true
  canary = 0.1                # first a tenth of conversations, beside the version that is latest [default: all]

Everything is checked before anything is submitted. The command may be killed at any time: given again, it goes on, and does
nothing twice that has ended. A change of the file runs again what depends on it.
Exit code 1: a step failed, the data carry no signal, or no round's gate passes. 2: the file or the tasks are refused.";

const UP_HELP: &str = "\
  espalier up --model-url http://localhost:8000/v1 --model Qwen/Qwen3-4B --mcp mcp.json
  espalier submit tasks.jsonl --watch          in another terminal

mcp.json: {\"mcpServers\": {\"browser\": {\"preset\": \"playwright\"}, \"notes\": {\"command\": \"notes-mcp\"}}}

The first SIGTERM or Ctrl-C drains: running rollouts end or go back to the queue. The second one stops at once.
Jobs, traces and the queue stay in the data folder for the next `up`.";

const CHAT_HELP: &str = "\
  espalier chat                                    # with the model that `espalier up` serves
  espalier chat --model-url http://localhost:8000/v1 --model Qwen/Qwen3-4B --mcp mcp.json --headed

/exit or Ctrl-D ends the chat and publishes its trace; `espalier traces show chat/NAME` reads it.";

const SUBMIT_HELP: &str = "\
A job is one JSON object a line; only `prompt` is needed:
  {\"id\":\"price-1\",\"prompt\":\"What does the red mug cost at ${site}/shop?\",\"mcp\":[\"browser\"],
   \"verify\":{\"answer\":{\"number\":12.5}}}

  espalier submit tasks.jsonl --var site=http://127.0.0.1:4310 --samples 4 --watch

Sending the same file under the same --batch again is harmless.
Exit code 2: some jobs were refused, and the others were accepted.";

const GENERATE_HELP: &str = "\
A request is one JSON object a line, as OpenAI's Batch API has it:
  {\"custom_id\":\"a\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",
   \"body\":{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}],\"max_tokens\":100}}

  espalier generate requests.jsonl -o answers.jsonl

Answers come in the order of the requests. The same command with the same --batch goes on where it was stopped.
Exit code 1: a job is dead. 2: the file was refused, or some lines were answered with an error.";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_a_help_text() {
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
        }
    }

    #[test]
    fn global_options_may_follow_the_command() {
        let cli = Cli::try_parse_from(["espalier", "watch", "b1", "--json"]).unwrap();
        assert!(cli.global.json);
        for line in [
            "watch --once",
            "watch --every 60",
            "watch b1",
            "watch b1 --once",
        ] {
            let words = ["espalier"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in ["watch --every 0", "watch --every 61"] {
            let words = ["espalier"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
        assert!(Cli::try_parse_from(["espalier", "cancel"]).is_err());
        assert!(Cli::try_parse_from(["espalier", "submit", "x", "--samples", "0"]).is_err());
    }
}
