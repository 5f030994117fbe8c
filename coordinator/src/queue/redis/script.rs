//! The scripts: each is put together from the parts that it names, in order, and goes by its digest, so that
//! coordinators of two versions can work on one server side by side.

use std::sync::LazyLock;

use redis::Script as Loaded;

/// What a script may do.
#[derive(Clone, Copy)]
enum Access {
    /// Only reads; it may run on a server that is full.
    Reads,
    /// Brings new work; refused by a server that is full.
    Adds,
    /// Takes work on or to its end; runs on a server that is full, since that is how room is made.
    Moves,
}

impl Access {
    /// The first line, which Redis 7 and later read.
    fn shebang(self) -> &'static str {
        match self {
            Self::Reads => "#!lua flags=no-writes\n",
            Self::Adds => "#!lua\n",
            Self::Moves => "#!lua flags=allow-oom\n",
        }
    }
}

macro_rules! parts {
    ($($name:literal),*) => { [$(include_str!(concat!("lua/lib/", $name, ".lua"))),*] };
}

const READS: &[&str] = &parts!("begin", "batch", "row", "view");
/// What has nothing to do with jobs.
const BARE: &[&str] = &parts!("begin");
const WRITES: &[&str] = &parts!(
    "begin", "batch", "row", "index", "ready", "state", "settle", "time", "lane", "insert", "done"
);
const GRANTS: &[&str] = &parts!(
    "begin", "batch", "row", "index", "ready", "state", "settle", "time", "grant", "done"
);

macro_rules! scripts {
    ($($name:ident: $access:ident, $parts:ident, $file:literal;)*) => {
        /// Every script, ready to run.
        pub struct Scripts { $(pub $name: Loaded,)* }

        impl Scripts {
            fn assemble() -> Self {
                Self { $($name: assemble(Access::$access, $parts, include_str!(concat!("lua/", $file))),)* }
            }

            /// All of them, to be loaded into a server.
            pub fn all(&self) -> Vec<&Loaded> {
                vec![$(&self.$name),*]
            }
        }
    };
}

scripts! {
    join: Moves, WRITES, "join.lua";
    open_batch: Adds, WRITES, "open_batch.lua";
    submit: Adds, WRITES, "submit.lua";
    close_batch: Moves, WRITES, "close_batch.lua";
    lease: Moves, GRANTS, "lease.lua";
    renew: Moves, WRITES, "renew.lua";
    finish: Moves, WRITES, "finish.lua";
    cancel: Moves, WRITES, "cancel.lua";
    requeue: Moves, WRITES, "requeue.lua";
    tick: Moves, WRITES, "tick.lua";
    extend_leases: Moves, WRITES, "extend_leases.lua";
    purge: Moves, WRITES, "purge.lua";
    close_idle: Moves, WRITES, "close_idle.lua";
    read_jobs: Reads, READS, "read_jobs.lua";
    read_specs: Reads, READS, "read_specs.lua";
    read_batches: Reads, READS, "read_batches.lua";
    read_newest: Reads, READS, "read_newest.lua";
    read_intakes: Reads, READS, "read_intakes.lua";
    read_digests: Reads, READS, "read_digests.lua";
    read_due: Reads, READS, "read_due.lua";
    read_stats: Reads, READS, "read_stats.lua";
    announce: Moves, BARE, "announce.lua";
    shown: Reads, BARE, "shown.lua";
}

/// The scripts of this version.
pub static SCRIPTS: LazyLock<Scripts> = LazyLock::new(Scripts::assemble);

fn assemble(access: Access, parts: &[&str], body: &str) -> Loaded {
    let mut source = access.shebang().to_owned();
    for part in parts.iter().copied().chain([body]) {
        source.push_str(part);
        source.push('\n');
    }
    Loaded::new(&source)
}
