//! A sequence of launches that is recorded once and launched as one.

#![expect(unsafe_code, reason = "a graph moves with the thread that owns it")]

use cudarc::driver::{CudaGraph, sys};

use super::device::{Device, Kept};
use super::error::{CudaError, Tried};

/// Recorded work. It names its buffers by address, and keeps them for as long as it exists: what is written to them later
/// is what the next replay reads.
pub struct Graph {
    graph: CudaGraph,
    _kept: Vec<Kept>,
}

// SAFETY: a graph must not be used by two threads at once. It has no interior mutability that two could reach: it is not
// `Sync`, so there is one user at a time.
unsafe impl Send for Graph {}

impl Device {
    /// Runs `work` once for real, so that kernels are compiled and algorithms chosen, then records it. The recording does
    /// nothing by itself. `work` may launch; it may not take memory, copy from or to the host, or wait.
    ///
    /// # Errors
    /// When `work` fails either time, or does what cannot be recorded.
    pub fn record(
        &self,
        mut work: impl FnMut(&Self) -> Result<(), CudaError>,
    ) -> Result<Graph, CudaError> {
        self.not_recording("record a graph")?;
        work(self)?;
        self.synchronize()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream().begin_capture(mode).tried("record a graph")?;
        self.recorded().replace(Some(Vec::new()));
        let done = work(self);
        let kept = self.recorded().take().unwrap_or_default();
        // The stream is brought out of recording in any case.
        let ended = self
            .stream()
            .end_capture(sys::CUgraphInstantiate_flags(0))
            .tried("end the recording of a graph");
        done?;
        let graph = ended?.ok_or(CudaError::Recording {
            tried: "find any work",
        })?;
        graph.upload().tried("take a graph")?;
        Ok(Graph { graph, _kept: kept })
    }
}

impl Graph {
    /// Launches what was recorded, after what was launched before.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn replay(&self) -> Result<(), CudaError> {
        self.graph.launch().tried("launch a graph")
    }
}
