//! Descriptors: cuDNN's objects, which are given attributes and then finished.

#![expect(
    unsafe_code,
    reason = "cuDNN's objects are made, used and destroyed by handle"
)]

use std::ffi::c_void;

use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type,
    cudnnBackendDescriptorType_t as Kind,
};

use super::answer;
use crate::cuda::error::CudaError;

/// What an attribute may hold.
///
/// # Safety
/// cuDNN reads and writes attributes of `TYPE` as values that are laid out like this type.
pub(super) unsafe trait Attribute: Copy {
    const TYPE: Type;
}

macro_rules! attributes {
    ($($of:ty => $kind:ident),* $(,)?) => {$(
        // SAFETY: cuDNN's header has this type for it.
        unsafe impl Attribute for $of {
            const TYPE: Type = Type::$kind;
        }
    )*};
}

attributes! {
    i64 => CUDNN_TYPE_INT64,
    f32 => CUDNN_TYPE_FLOAT,
    bool => CUDNN_TYPE_BOOLEAN,
    Note => CUDNN_TYPE_NUMERICAL_NOTE,
    Object => CUDNN_TYPE_BACKEND_DESCRIPTOR,
    Pointer => CUDNN_TYPE_VOID_PTR,
    sys::cudnnHandle_t => CUDNN_TYPE_HANDLE,
    sys::cudnnDataType_t => CUDNN_TYPE_DATA_TYPE,
    sys::cudnnPointwiseMode_t => CUDNN_TYPE_POINTWISE_MODE,
    sys::cudnnReduceTensorOp_t => CUDNN_TYPE_REDUCTION_OPERATOR_TYPE,
    sys::cudnnBackendHeurMode_t => CUDNN_TYPE_HEUR_MODE,
}

/// A descriptor, as attributes of others name it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Object(sys::cudnnBackendDescriptor_t);

/// An address, of the device or of the host.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Pointer(pub(super) *mut c_void);

/// What an engine does to numbers. A plain number, since newer versions have more than are known here.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Note(pub(super) u32);

/// A descriptor. What it names by its attributes must live as long.
pub(super) struct Descriptor {
    raw: sys::cudnnBackendDescriptor_t,
    /// What errors call it.
    what: String,
}

// SAFETY: descriptors belong to no thread; whoever owns one is not `Sync`.
unsafe impl Send for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed only here; there is no one to tell of a failure.
        let _ = unsafe { sys::cudnnBackendDestroyDescriptor(self.raw) };
    }
}

impl Descriptor {
    pub(super) fn new(kind: Kind, what: impl Into<String>) -> Result<Self, CudaError> {
        let what = what.into();
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let status = unsafe { sys::cudnnBackendCreateDescriptor(kind, &raw mut raw) };
        answer(status, || format!("make {what}"))?;
        Ok(Self { raw, what })
    }

    /// Gives it an attribute.
    pub(super) fn with<T: Attribute>(self, name: Name, values: &[T]) -> Result<Self, CudaError> {
        // SAFETY: the descriptor lives; as many values of the type are read before the call returns.
        let status = unsafe {
            let count = values.len() as i64;
            sys::cudnnBackendSetAttribute(self.raw, name, T::TYPE, count, values.as_ptr().cast())
        };
        answer(status, || format!("give {} its {name:?}", self.what))?;
        Ok(self)
    }

    /// Ends its making: from here on it can be used and no longer changed.
    pub(super) fn finish(self) -> Result<Self, CudaError> {
        // SAFETY: the descriptor lives.
        let status = unsafe { sys::cudnnBackendFinalize(self.raw) };
        answer(status, || format!("finish {}", self.what))?;
        Ok(self)
    }

    pub(super) fn object(&self) -> Object {
        Object(self.raw)
    }

    pub(super) fn raw(&self) -> sys::cudnnBackendDescriptor_t {
        self.raw
    }

    /// Reads up to `values.len()` values of an attribute, and says how many there are.
    pub(super) fn read<T: Attribute>(
        &self,
        name: Name,
        values: &mut [T],
    ) -> Result<usize, CudaError> {
        let mut count = 0;
        let room = values.len() as i64;
        // SAFETY: the descriptor lives; at most as many values of the type are written as there is room for.
        let status = unsafe {
            let to = values.as_mut_ptr().cast();
            sys::cudnnBackendGetAttribute(self.raw, name, T::TYPE, room, &raw mut count, to)
        };
        answer(status, || format!("tell {name:?} of {}", self.what))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }
}
