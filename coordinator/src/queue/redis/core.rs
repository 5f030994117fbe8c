//! One shard: the keys that share a slot, how its scripts are called, and what this process remembers of it.
//!
//! What is remembered never changes while it may be used: batches keep their name and defaults under a number that
//! is given once, and lanes come with a version that the scripts compare. A server that has lost something gives numbers
//! and versions again, so that nothing is remembered beyond a generation of the link.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, ProjectId};
use espalier_core::queue::{JobKind, MachineConfig};
use espalier_runtime::clock::Clock;
use futures::future::{try_join, try_join_all};
use redis::{Cmd, Script, Value};

use super::decode::{self, Reader};
use super::link::Link;
use super::script::SCRIPTS;
use crate::queue::QueueError;

/// Batches that are remembered; with defaults of a few hundred bytes some megabytes. Beyond, all are asked for anew.
const BATCHES_MAX: usize = 4_096;

/// A silence that counts as an outage of the server or of all coordinators: each of them asks every second.
pub const OUTAGE_AFTER: Duration = Duration::from_secs(10);

/// The version of the keys and values that this code writes; the golden file beside the tests shows them.
pub const LAYOUT: u32 = 2;

/// One shard.
pub struct Core {
    pub link: Arc<Link>,
    /// What every key begins with, and the slot's tag in it: `{name:shard}:`.
    pub prefix: String,
    /// Stands in for the server's clock in tests.
    pub clock: Option<Arc<dyn Clock>>,
    known: Mutex<Known>,
}

/// What is remembered of one generation of the link.
#[derive(Default)]
struct Known {
    generation: u64,
    batches: HashMap<u32, Arc<KnownBatch>>,
    lanes: Arc<Lanes>,
}

/// What never changes about a batch.
#[derive(Debug)]
pub struct KnownBatch {
    pub project: ProjectId,
    pub batch: BatchId,
    pub defaults: Bytes,
}

/// The lanes of a shard, as of one version.
#[derive(Debug, Default)]
pub struct Lanes {
    pub version: String,
    lanes: Vec<(JobKind, BTreeSet<String>, String)>,
}

impl Lanes {
    /// The lanes of `kind` that a worker which offers `offers` may draw from.
    pub fn open_to(&self, kind: JobKind, offers: &BTreeSet<String>) -> Vec<&str> {
        let open = self
            .lanes
            .iter()
            .filter(|(of, needs, _)| *of == kind && needs.is_subset(offers));
        open.map(|(_, _, lane)| lane.as_str()).collect()
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl Core {
    /// A shard of which nothing is known yet.
    pub fn new(link: Arc<Link>, prefix: String, clock: Option<Arc<dyn Clock>>) -> Self {
        Self {
            link,
            prefix,
            clock,
            known: Mutex::default(),
        }
    }

    /// The beginning of a call of `script`, as `begin.lua` reads it. Where a test moves the clock, no leap of it is an
    /// outage.
    pub fn cmd(&self, script: &Script) -> Cmd {
        let outage = self.clock.is_none().then_some(OUTAGE_AFTER);
        self.cmd_with(script, outage)
    }

    fn cmd_with(&self, script: &Script, outage_after: Option<Duration>) -> Cmd {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(script.get_hash()).arg(1).arg(self.key("m"));
        match &self.clock {
            Some(clock) => cmd.arg(clock.now().0),
            None => cmd.arg(""),
        };
        match outage_after {
            Some(after) => cmd.arg(after.as_micros() as u64),
            None => cmd.arg(""),
        };
        cmd
    }

    /// The full name of a key.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Says that a coordinator is here, makes the shard one of `shards`, where it is new, and tells it the shares of
    /// projects. If no coordinator was here for a while, leases are prolonged by that time: nobody could renew. Answers
    /// with the number of shards and the version of the layout that it has; where those are others, it stays as it is.
    pub async fn join(
        &self,
        shards: u16,
        machine: &MachineConfig,
    ) -> Result<(u16, u32), QueueError> {
        let mut cmd = self.cmd_with(&SCRIPTS.join, Some(OUTAGE_AFTER));
        cmd.arg(shards).arg(LAYOUT).arg(machine.weights.len() + 1);
        cmd.arg("").arg(machine.weight_default);
        for (project, weight) in &machine.weights {
            cmd.arg(project.as_str()).arg(*weight);
        }
        let mut found = Reader::of(self.link.run(&cmd).await?)?;
        Ok((found.number()?, found.number()?))
    }

    /// What is remembered of the present generation, and its number.
    fn known(&self) -> (MutexGuard<'_, Known>, u64) {
        let generation = self.link.generation();
        let mut known = lock(&self.known);
        if known.generation != generation {
            *known = Known {
                generation,
                ..Known::default()
            };
        }
        (known, generation)
    }

    /// Name and defaults of the batches with these numbers; of one that was purged meanwhile nothing.
    pub async fn known_batches(
        &self,
        numbers: BTreeSet<u32>,
    ) -> Result<HashMap<u32, Arc<KnownBatch>>, QueueError> {
        let mut found = HashMap::new();
        let mut missing = Vec::new();
        {
            let (known, _) = self.known();
            for b in numbers {
                match known.batches.get(&b) {
                    Some(batch) => drop(found.insert(b, Arc::clone(batch))),
                    None => missing.push(b),
                }
            }
        }
        if missing.is_empty() {
            return Ok(found);
        }
        let before = self.link.generation();
        // Side by side, so that all of them wait for the server once.
        let read = try_join_all(missing.iter().map(|b| self.read_batch(*b))).await?;
        let (mut known, generation) = self.known();
        for (b, batch) in missing.into_iter().zip(read) {
            let Some(batch) = batch.map(Arc::new) else {
                continue;
            };
            if known.batches.len() >= BATCHES_MAX {
                known.batches.clear();
            }
            if generation == before {
                known.batches.insert(b, Arc::clone(&batch));
            }
            found.insert(b, batch);
        }
        drop(known);
        Ok(found)
    }

    async fn read_batch(&self, b: u32) -> Result<Option<KnownBatch>, QueueError> {
        let name = redis::cmd("HGET")
            .arg(self.key(&format!("b:{b}")))
            .arg("name")
            .take();
        let defaults = redis::cmd("GET").arg(self.key(&format!("bd:{b}"))).take();
        let (name, defaults) = try_join(self.link.run(&name), self.link.run(&defaults)).await?;
        if name == Value::Nil || defaults == Value::Nil {
            return Ok(None);
        }
        let (project, batch) = decode::batch_name(&decode::text(name)?)?;
        Ok(Some(KnownBatch {
            project,
            batch,
            defaults: decode::bytes(defaults)?,
        }))
    }

    /// The lanes as they were last read.
    pub fn lanes(&self) -> Arc<Lanes> {
        Arc::clone(&self.known().0.lanes)
    }

    /// Reads the lanes anew. The version is read first: lanes that change in between have a later one.
    pub async fn read_lanes(&self) -> Result<(), QueueError> {
        let before = self.link.generation();
        let version = redis::cmd("HGET").arg(self.key("m")).arg("lanes").take();
        let lanes = redis::cmd("HGETALL").arg(self.key("lanes")).take();
        let version = match self.link.run(&version).await? {
            Value::Nil => "0".to_owned(),
            version => decode::text(version)?,
        };
        let mut fields = Reader::of(self.link.run(&lanes).await?)?;
        let mut found = Vec::new();
        while !fields.is_empty() {
            let lane = fields.text()?;
            let (kind, needs) = decode::lane(&fields.text()?)?;
            found.push((kind, needs, lane));
        }
        let (mut known, generation) = self.known();
        if generation == before {
            known.lanes = Arc::new(Lanes {
                version,
                lanes: found,
            });
        }
        Ok(())
    }
}

/// No code that may panic runs under these locks, and the state is valid after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
