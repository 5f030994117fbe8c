//! How far long work is, for whoever shows it, and the word to stop.

use std::sync::{Arc, Mutex, PoisonError};

use espalier_runtime::hub::Meter;
use tokio_util::sync::CancellationToken;

/// Shared between the work and its watcher.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    stage: Arc<Mutex<Stage>>,
    /// Ends the work where it computes; waits end when they are dropped.
    pub stop: CancellationToken,
}

#[derive(Clone, Debug, Default)]
struct Stage {
    name: &'static str,
    meter: Arc<Meter>,
}

impl Watch {
    /// What is done now, and how far it is.
    #[must_use]
    pub fn stage(&self) -> (&'static str, Arc<Meter>) {
        let stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        (stage.name, Arc::clone(&stage.meter))
    }

    /// As a line: `uploads, 40 %`.
    #[must_use]
    pub fn line(&self) -> String {
        let (name, meter) = self.stage();
        match meter.total() {
            0 => name.to_owned(),
            total => format!("{name}, {} %", meter.done().min(total) * 100 / total),
        }
    }

    /// Another thing is done from now on.
    pub(crate) fn begin(&self, name: &'static str) -> Arc<Meter> {
        let meter = Arc::new(Meter::default());
        let stage = Stage {
            name,
            meter: Arc::clone(&meter),
        };
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
        meter
    }
}
