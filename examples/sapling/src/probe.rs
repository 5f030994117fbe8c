//! What a served model solves on the twin of the site: quick, and no substitute for real browsers.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_agent_worker::observe;
use espalier_practice::tasks::{Split, Task};
use espalier_practice::teacher::{Act, TAUGHT, episode};
use espalier_practice::twin::Twin;
use espalier_practice::world::World;
use espalier_qwen3_text::Tokenizer;
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use crate::Failed;
use crate::lessons::{OBSERVATION, tools};

/// More turns than any lesson has.
const TURNS_MAX: usize = 12;

/// How it is asked.
#[derive(clap::Args, Clone)]
pub struct Args {
    /// The API, such as `http://127.0.0.1:8000/v1`
    url: String,
    /// The model's name
    #[arg(long, default_value = "sapling")]
    model: String,
    /// The site
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Tasks of each kind
    #[arg(long, default_value_t = 36)]
    tasks: usize,
    /// Which tasks
    #[arg(long, default_value = "eval")]
    split: Split,
    /// Tells how tasks are done
    #[arg(long)]
    hints: bool,
    /// Prints what became of each
    #[arg(long)]
    each: bool,
    /// Tasks at once
    #[arg(long, default_value_t = 32)]
    parallel: usize,
}

/// Prints how many tasks of each kind were solved.
///
/// # Errors
/// The model does not answer.
#[tokio::main]
pub async fn run(args: &Args) -> Result<(), Failed> {
    let own = Tokenizer::shared().map_err(Failed::Own)?;
    let world: &'static World = Box::leak(Box::new(World::new(args.seed)));
    let (client, room) = (
        reqwest::Client::new(),
        Arc::new(Semaphore::new(args.parallel)),
    );
    let mut asked = tokio::task::JoinSet::new();
    for kind in TAUGHT {
        let mut tasks = kind.tasks(world);
        tasks.retain(|task| Split::of(&task.key()) == args.split);
        for task in tasks.into_iter().take(args.tasks) {
            let (args, client, room) = (args.clone(), client.clone(), Arc::clone(&room));
            asked.spawn(async move {
                let _room = room.acquire_owned().await;
                let what = solve(&args, &client, world, &task, own).await;
                (kind, task, what)
            });
        }
    }
    let mut solved: BTreeMap<&str, [usize; 2]> = BTreeMap::new();
    while let Some(one) = asked.join_next().await {
        let (kind, task, what) = one.map_err(|_| Failed::Thread)?;
        let what = what?;
        let of = solved.entry(kind.as_str()).or_default();
        of[usize::from(what.is_ok())] += 1;
        if args.each {
            println!(
                "{}: {}",
                task.key(),
                what.err().unwrap_or_else(|| "solved".to_owned())
            );
        }
    }
    for (kind, [not, solved]) in solved {
        println!(
            "{}",
            json!({"kind": kind, "hints": args.hints, "solved": solved, "of": not + solved})
        );
    }
    Ok(())
}

/// Inner error: why it is not solved.
async fn solve(
    args: &Args,
    client: &reqwest::Client,
    world: &World,
    task: &Task,
    own: &Tokenizer,
) -> Result<Result<(), String>, Failed> {
    let origin = "http://localhost:4310";
    let lesson = episode(world, task, origin)?;
    let Some(Act::Answer(expected)) = lesson.turns.last().map(|turn| &turn.act) else {
        return Ok(Err("no answer is known".to_owned()));
    };
    let mut twin = Twin::new(world, origin);
    let mut messages = Vec::new();
    if args.hints {
        messages.push(json!({"role": "system", "content": lesson.hints}));
    }
    messages.push(json!({"role": "user", "content": lesson.prompt}));
    for turn in 0..TURNS_MAX {
        let body = json!({"model": args.model, "messages": messages, "tools": tools(), "temperature": 0, "max_tokens": 160});
        let request = client
            .post(format!("{}/chat/completions", args.url))
            .json(&body);
        let reply: Value = request.send().await?.error_for_status()?.json().await?;
        let message = reply["choices"][0]["message"].clone();
        let call = &message["tool_calls"][0];
        let Some(name) = call["function"]["name"].as_str().map(ToOwned::to_owned) else {
            let said = message["content"].as_str().unwrap_or_default();
            return Ok(match said.trim() == expected {
                true => Ok(()),
                false => Err(format!("turn {turn}: answered {said:?}, not {expected:?}")),
            });
        };
        let text = call["function"]["arguments"].as_str().unwrap_or_default();
        let arguments: Map<String, Value> = match serde_json::from_str(text) {
            Ok(arguments) => arguments,
            Err(_) => return Ok(Err(format!("turn {turn}: arguments {text:?}"))),
        };
        let id = call["id"].clone();
        let shown = match twin.call(&name, &arguments) {
            Ok(result) => observe::shape(&result, OBSERVATION, own).text,
            Err(error) => return Ok(Err(format!("turn {turn}: {error}: {text}"))),
        };
        messages.push(message);
        messages.push(json!({"role": "tool", "tool_call_id": id, "content": shown}));
    }
    Ok(Err("too many turns".to_owned()))
}
