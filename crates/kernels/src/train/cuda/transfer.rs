//! Numbers between host and device: written, read, and whole buffers moved away and back on a stream of their own.

#![expect(unsafe_code, reason = "memory is copied by address")]

use std::ffi::c_void;

use cudarc::driver::sys;
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::super::{BufferId, Kind, Mat, Slice};
use super::Cuda;
use super::arena::element_bytes;
use crate::buffer::Plain;
use crate::cuda::error::{CudaError, Tried};

/// Elements that are converted at a time.
const CHUNK: usize = 1 << 20;

impl Cuda {
    pub(super) fn write_numbers(
        &mut self,
        buffer: BufferId,
        start: usize,
        values: &[f32],
    ) -> Result<(), CudaError> {
        let kind = self.arena.kind(buffer);
        let room = Slice::new(buffer, start, values.len());
        match kind {
            Kind::Exact => self.put(room, kind, bytes_of(values)),
            Kind::Weights | Kind::Activations => {
                let mut narrow = vec![bf16::ZERO; values.len().min(CHUNK)];
                let mut at = start;
                for values in values.chunks(CHUNK) {
                    let narrow = &mut narrow[..values.len()];
                    narrow.convert_from_f32_slice(values);
                    self.put(Slice::new(buffer, at, values.len()), kind, bytes_of(narrow))?;
                    at += values.len();
                }
                Ok(())
            }
            Kind::Ids | Kind::Bytes => panic!("{buffer:?} holds no numbers"),
        }
    }

    /// Numbers that lie in memory as bf16: where they are kept so, as they are.
    pub(super) fn write_narrow(
        &mut self,
        buffer: BufferId,
        start: usize,
        bytes: &[u8],
    ) -> Result<(), CudaError> {
        let (pairs, _) = bytes.as_chunks::<2>();
        match self.arena.kind(buffer) {
            kind @ (Kind::Weights | Kind::Activations) => {
                self.put(Slice::new(buffer, start, pairs.len()), kind, bytes)
            }
            Kind::Exact => {
                for (chunk, pairs) in pairs.chunks(CHUNK).enumerate() {
                    let wide = |pair: &[u8; 2]| bf16::from_le_bytes(*pair).to_f32();
                    let values: Vec<f32> = pairs.iter().map(wide).collect();
                    self.write_numbers(buffer, start + chunk * CHUNK, &values)?;
                }
                Ok(())
            }
            Kind::Ids | Kind::Bytes => panic!("{buffer:?} holds no numbers"),
        }
    }

    pub(super) fn put_ids(
        &mut self,
        buffer: BufferId,
        start: usize,
        values: &[u32],
    ) -> Result<(), CudaError> {
        let to = Slice::new(buffer, start, values.len());
        self.put(to, Kind::Ids, bytes_of(values))
    }

    /// Writes elements as they lie in memory.
    pub(super) fn put(&mut self, to: Slice, kind: Kind, bytes: &[u8]) -> Result<(), CudaError> {
        self.arena.slice(&self.device, to, kind);
        let start = to.start * element_bytes(kind);
        self.device
            .write(self.arena.buffer(to.buffer), start, bytes)
    }

    pub(super) fn read_numbers(&mut self, from: Slice) -> Result<Vec<f32>, CudaError> {
        let kind = self.arena.kind(from.buffer);
        let bytes = self.get(from, kind)?;
        Ok(match kind {
            Kind::Exact => {
                let (values, _) = bytes.as_chunks::<4>();
                values.iter().map(|x| f32::from_le_bytes(*x)).collect()
            }
            Kind::Weights | Kind::Activations => {
                let (values, _) = bytes.as_chunks::<2>();
                let wide = |x: &[u8; 2]| bf16::from_le_bytes(*x).to_f32();
                values.iter().map(wide).collect()
            }
            Kind::Ids | Kind::Bytes => panic!("{:?} holds no numbers", from.buffer),
        })
    }

    /// Reads elements as they lie in memory, after all that was launched.
    pub(super) fn get(&mut self, from: Slice, kind: Kind) -> Result<Vec<u8>, CudaError> {
        let address = self.arena.slice(&self.device, from, kind);
        let mut bytes = vec![0u8; from.len * element_bytes(kind)];
        self.device.bind()?;
        let stream = self.device.stream().cu_stream();
        // SAFETY: the range lies in its buffer, as the arena has checked, and the copy ends before `bytes` is read.
        unsafe { cudarc::driver::result::memcpy_dtoh_async(&mut bytes, address, stream) }
            .tried("copy to the host")?;
        self.device.synchronize()?;
        Ok(bytes)
    }

    pub(super) fn clear(&mut self, to: Slice) -> Result<(), CudaError> {
        let kind = self.arena.kind(to.buffer);
        self.arena.slice(&self.device, to, kind);
        let size = element_bytes(kind);
        let (start, len) = (to.start * size, to.len * size);
        self.device.clear(self.arena.buffer(to.buffer), start, len)
    }

    pub(super) fn copy_rows(&mut self, from: Mat, to: Mat) -> Result<(), CudaError> {
        assert!(from.rows == to.rows && from.cols == to.cols);
        let kind = self.arena.kind(from.buffer);
        assert_eq!(kind, self.arena.kind(to.buffer), "copies keep the kind");
        if from.rows == 0 || from.cols == 0 {
            return Ok(());
        }
        let slice = |mat: Mat| Slice::new(mat.buffer, mat.start, mat.span());
        let size = element_bytes(kind);
        let copy = sys::CUDA_MEMCPY2D_st {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: self.arena.slice(&self.device, slice(from), kind),
            srcArray: std::ptr::null_mut(),
            srcPitch: from.stride * size,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: self.arena.slice(&self.device, slice(to), kind),
            dstArray: std::ptr::null_mut(),
            dstPitch: to.stride * size,
            WidthInBytes: from.cols * size,
            Height: from.rows,
        };
        let dense = from.stride == from.cols && to.stride == to.cols;
        self.device.bind()?;
        let stream = self.device.stream().cu_stream();
        // SAFETY: both matrices lie in their buffers, as the arena has checked.
        unsafe {
            match dense {
                true => sys::cuMemcpyDtoDAsync_v2(
                    copy.dstDevice,
                    copy.srcDevice,
                    copy.WidthInBytes * copy.Height,
                    stream,
                ),
                false => sys::cuMemcpy2DAsync_v2(&raw const copy, stream),
            }
        }
        .result()
        .tried("copy on the device")
    }

    /// Copies a whole buffer to the host (`away`) or back, on the stream of copies, after all that was launched so far.
    pub(super) fn shift(
        &mut self,
        on_device: BufferId,
        on_host: BufferId,
        away: bool,
    ) -> Result<(), CudaError> {
        let kind = self.arena.kind(on_device);
        let len = self.arena.len(on_device);
        assert!(kind == self.arena.kind(on_host) && len == self.arena.len(on_host));
        let bytes = len * element_bytes(kind);
        let address = self.arena.first(&self.device, on_device, len, kind);
        self.device.bind()?;
        self.launched
            .record(self.device.stream())
            .tried("record an event")?;
        self.copies
            .wait(&self.launched)
            .tried("order a copy behind what was launched")?;
        let host = self.arena.host(on_host);
        let pinned = host.address()?.cast::<c_void>();
        let stream = self.copies.cu_stream();
        // SAFETY: both hold as many bytes and live until the copy has ended: the host's waits for it, and memory of the
        // device is given back on its own stream, behind the copy as the schedule orders it.
        unsafe {
            match away {
                true => sys::cuMemcpyDtoHAsync_v2(pinned, address, bytes, stream),
                false => sys::cuMemcpyHtoDAsync_v2(address, pinned, bytes, stream),
            }
        }
        .result()
        .tried("move a buffer between device and host")?;
        host.moved.record(&self.copies).tried("record an event")
    }

    /// Orders what follows behind the last copy of a host buffer.
    pub(super) fn await_shift(&mut self, on_host: BufferId) -> Result<(), CudaError> {
        let host = self.arena.host(on_host);
        self.device
            .stream()
            .wait(&host.moved)
            .tried("order what follows behind a copy")
    }
}

/// Numbers as they lie in memory.
fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have no padding, and bytes no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
