//! `espalier runpod down`: ends the pods of a name.

use std::io::{self, BufRead, IsTerminal};

use clap::Args;
use espalier_coordinator::scaler::runpod::wire::Pod;
use espalier_runtime::tasks;
use serde_json::json;

use super::status::{self, dollars};
use super::{Account, NAME_DEFAULT, patiently};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::note;
use crate::progress;

/// Options of `down`.
#[derive(Args, Clone, Debug)]
pub struct Down {
    /// Name of the pods, as `up` was given it or as a coordinator's scaler is called
    #[arg(long, value_name = "NAME", default_value = NAME_DEFAULT)]
    pub name: String,
    /// End them without asking
    #[arg(long, short)]
    pub yes: bool,
    /// Where the account is.
    #[command(flatten)]
    pub account: Account,
}

/// `espalier runpod down`.
pub async fn run(context: &Context, args: &Down) -> Outcome {
    let client = args.account.client(context)?;
    let pods = status::of_name(patiently(|| client.pods()).await?, Some(&args.name));
    if !pods.is_empty() && !args.yes && !confirmed(args, &pods).await? {
        return Err(Problem::refused("nothing was ended"));
    }
    let bar = progress::things(pods.len() as u64, "ending");
    for pod in &pods {
        bar.set_message(pod.marks.instance.clone());
        patiently(|| client.delete(&pod.id)).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let left = match pods.is_empty() {
        true => Vec::new(),
        false => status::of_name(patiently(|| client.pods()).await?, Some(&args.name)),
    };
    if !left.is_empty() {
        let names: Vec<&str> = left.iter().map(|pod| pod.marks.instance.as_str()).collect();
        return Err(Problem::failed(format!("there are still pods of `{}`: {}", args.name, names.join(", ")))
            .fix("stop what starts them, such as a coordinator whose scaler has that name, then try again"));
    }
    let ended: Vec<&str> = pods.iter().map(|pod| pod.marks.instance.as_str()).collect();
    context.out.show(
        || json!({"ended": ended}),
        || match ended.len() {
            0 => format!("there are no pods of `{}`", args.name),
            1 => format!("{} has ended", ended[0]),
            n => format!("{n} pods have ended"),
        },
    )?;
    Ok(Exit::Ok)
}

/// Asks whoever sits at the terminal.
async fn confirmed(args: &Down, pods: &[Pod]) -> Result<bool, Problem> {
    if !io::stdin().is_terminal() {
        return Err(Problem::refused(format!(
            "{} pods of `{}` would be ended, and nobody can be asked",
            pods.len(),
            args.name
        ))
        .fix("give --yes"));
    }
    let cost: f64 = pods.iter().map(|pod| pod.cost).sum();
    note(status::table_of(pods, status::now()));
    note(format!(
        "end these {} pods, which cost {} an hour, and what runs in them? [y/N]",
        pods.len(),
        dollars(cost)
    ));
    let read = tasks::blocking("runpod.confirm", || {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    let line = read
        .await
        .map_err(|error| Problem::failed(error.to_string()))??;
    Ok(matches!(
        line.trim().to_ascii_lowercase().as_str(),
        "y" | "yes"
    ))
}
