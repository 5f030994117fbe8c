//! `espalier lineage`: what an adapter was made from, with digests that are held against what is there.

mod tree;
mod walk;

use clap::Args;
use serde_json::json;

use crate::adapters::{Opened, Place, Wanted};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, note};
use crate::progress;
use walk::Walker;

pub use tree::Node;

/// Options of `lineage`.
#[derive(Args, Clone, Debug)]
pub struct Lineage {
    /// Adapter, with @vN for one of its versions [default: the newest]
    #[arg(value_name = "ADAPTER[@vN]")]
    pub adapter: Wanted,
    /// Where adapters are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Lineage) -> Outcome {
    let opened = args.place.open(context).await?;
    let tree = of(&opened, &args.adapter).await?;
    let [verified, unverified, broken] = tree.counts();
    let counts = json!({"verified": verified, "unverified": unverified, "broken": broken});
    context.out.show(
        || json!({"counts": counts, "lineage": tree}),
        || format!("{}\n\n{}", tree.to_text(), counted(&tree)),
    )?;
    if broken > 0 {
        note(format!(
            "error: {} things are not what was written down",
            count(broken)
        ));
        return Ok(Exit::Failed);
    }
    Ok(Exit::Ok)
}

/// What a version was made from, held against the digests that were written down.
pub async fn of(opened: &Opened, adapter: &Wanted) -> Result<Node, Problem> {
    let version = opened.find(adapter).await?;
    let bar = progress::things(0, "verifying");
    let walker = Walker {
        store: &opened.store,
        project: &opened.project,
        bar: &bar,
    };
    let tree = walker.adapter(&version).await;
    bar.finish_and_clear();
    Ok(tree)
}

/// How many things of a tree are what was written down.
pub fn counted(tree: &Node) -> String {
    let [verified, unverified, broken] = tree.counts().map(count);
    format!("{verified} verified, {unverified} cannot be verified here, {broken} broken")
}
