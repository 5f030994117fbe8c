//! `espalier top`: what `watch` shows of the whole system, on a screen that keys turn, sort and filter.

use clap::Args;

use crate::context::Context;
use crate::exit::Outcome;
use crate::watch;

/// Options of `top`.
#[derive(Args, Clone, Debug)]
pub struct Top {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub every: u64,
    /// Print one frame as text and end, as without a terminal; with --json one object
    #[arg(long, conflicts_with = "every")]
    pub once: bool,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Top) -> Outcome {
    watch::top(context, args.once, args.every).await
}
