//! Points in time on a device: how long it worked on what was launched between two of them.

use cudarc::driver::{CudaEvent, sys};

use super::device::Device;
use super::error::{CudaError, Tried};

/// The end of what was launched before it.
pub struct Mark(CudaEvent);

impl Device {
    /// Marks the end of what was launched so far.
    ///
    /// # Errors
    /// When the driver refuses, or a graph is being recorded.
    pub fn mark(&self) -> Result<Mark, CudaError> {
        self.not_recording("mark a time")?;
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = self
            .context()
            .new_event(Some(flags))
            .tried("make an event")?;
        event.record(self.stream()).tried("record an event")?;
        Ok(Mark(event))
    }
}

impl Mark {
    /// Milliseconds from this mark to a later one. Waits for both.
    ///
    /// # Errors
    /// When what was launched before them failed.
    pub fn ms_until(&self, later: &Self) -> Result<f32, CudaError> {
        self.0.elapsed_ms(&later.0).tried("tell the time")
    }
}
