//! cuDNN's graphs: operations on tensors are described one by one, cuDNN finds kernels for all of them together, and what
//! comes of it is a plan that runs again and again. [`attention`] has the graphs that training runs; nothing else does.
//!
//! cuDNN knows a graph by its nodes: another order of the same arithmetic may be refused. It is closed and may be absent or
//! older than what was tried, so its callers have a kernel of their own to fall back on.

#![expect(
    unsafe_code,
    reason = "cuDNN's objects are made, used and destroyed by handle"
)]

pub(crate) mod attention;
mod descriptor;
mod graph;
mod plan;

use cudarc::cudnn::result::CudnnError;
use cudarc::cudnn::sys;

use super::device::Device;
use super::error::CudaError;
use super::library;

/// The oldest that was tried.
pub(crate) const VERSION_MIN: usize = 91_400;

/// cuDNN on a device's stream.
pub(crate) struct Cudnn {
    handle: sys::cudnnHandle_t,
}

// SAFETY: a handle may be used by any thread, one at a time; whoever owns this is not `Sync`.
unsafe impl Send for Cudnn {}

impl Cudnn {
    /// Opens it, if it is here and new enough.
    pub(crate) fn open(device: &Device) -> Result<Self, CudaError> {
        library::need_cudnn()?;
        device.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        answer(unsafe { sys::cudnnCreate(&raw mut handle) }, || {
            "start".to_owned()
        })?;
        let cudnn = Self { handle };
        let stream = device.stream().cu_stream().cast();
        // SAFETY: the handle and the stream live.
        answer(unsafe { sys::cudnnSetStream(handle, stream) }, || {
            "take the device's stream".to_owned()
        })?;
        Ok(cudnn)
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        // SAFETY: made by `open`, destroyed only here; there is no one to tell of a failure.
        let _ = unsafe { sys::cudnnDestroy(self.handle) };
    }
}

/// What a call has answered, with what cuDNN says of it.
fn answer(status: sys::cudnnStatus_t, tried: impl FnOnce() -> String) -> Result<(), CudaError> {
    if status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let mut text = [0u8; 1024];
    // SAFETY: at most that many bytes are written.
    unsafe { sys::cudnnGetLastErrorString(text.as_mut_ptr().cast(), text.len()) };
    let end = text.iter().position(|byte| *byte == 0);
    let said = String::from_utf8_lossy(&text[..end.unwrap_or(text.len())]);
    Err(CudaError::Graph {
        tried: tried(),
        said: said.trim().to_owned(),
        source: CudnnError(status),
    })
}
