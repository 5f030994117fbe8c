//! Memory: on the device, and pages of the host that the device copies from and to by itself.

#![expect(
    unsafe_code,
    reason = "memory is taken from the driver and copied by address"
)]

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{
    CudaEvent, CudaSlice, DevicePtr, DeviceRepr, PinnedHostSlice, ValidAsZeroBits, result,
};
use half::bf16;

use super::device::Device;
use super::error::{CudaError, Tried};
use super::ops::SampleRow;

/// What a buffer may hold: plain numbers, of which every pattern of bits is one.
pub trait Element: DeviceRepr + ValidAsZeroBits + Copy + Send + Sync + 'static {}

impl Element for bf16 {}
impl Element for f32 {}
impl Element for u32 {}
impl Element for i64 {}
impl Element for u8 {}
impl Element for [u32; 2] {}
impl Element for [u32; 4] {}
impl Element for SampleRow {}

/// Kernels move 16 bytes at a time: memory is taken in whole ones, and buffers begin at one.
const UNIT_BYTES: usize = 16;

/// `len` values on the device. The memory is given back when the buffer, all its parts and all graphs that name it are
/// gone.
pub struct Buffer<T: Element> {
    memory: Arc<CudaSlice<u8>>,
    /// Where it begins in the memory.
    start_bytes: usize,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// How many values it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` values of another kind in the same memory, from this buffer's value `start` on. What is written to the one
    /// is read from the other.
    ///
    /// # Errors
    /// When they do not lie within this buffer, or do not begin at a whole 16 bytes.
    pub fn part<U: Element>(&self, start: usize, len: usize) -> Result<Buffer<U>, CudaError> {
        let start_bytes = start * size_of::<T>();
        let holds = (self.len * size_of::<T>()).saturating_sub(start_bytes) / size_of::<U>();
        within("part", 0, len, holds)?;
        let refused = || CudaError::Shape {
            operation: "part",
            name: "start",
            rule: format!("must be at a multiple of {UNIT_BYTES} bytes"),
            got: start_bytes,
        };
        if !start_bytes.is_multiple_of(UNIT_BYTES) {
            return Err(refused());
        }
        Ok(Buffer {
            memory: Arc::clone(&self.memory),
            start_bytes: self.start_bytes + start_bytes,
            len,
            of: PhantomData,
        })
    }

    /// Its address, for use on `device`'s stream. While a graph is recorded, the graph keeps the memory.
    pub(crate) fn address(&self, device: &Device) -> u64 {
        device.keep(|| self.memory.clone());
        // Events are not tracked, so there is nothing to record when the guard goes.
        self.memory.device_ptr(device.stream()).0 + self.start_bytes as u64
    }
}

impl Device {
    /// `len` zeroes.
    ///
    /// # Errors
    /// When the device has no room for them, or a graph is being recorded.
    pub fn zeroed<T: Element>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        self.not_recording("take memory")?;
        let bytes = len * size_of::<T>();
        // A length of zero has no address; a unit stands in for it.
        let memory = self
            .stream()
            .alloc_zeros(bytes.next_multiple_of(UNIT_BYTES).max(UNIT_BYTES))
            .tried(format!("give {bytes} bytes of memory"))?;
        Ok(Buffer {
            memory: Arc::new(memory),
            start_bytes: 0,
            len,
            of: PhantomData,
        })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As [`Self::zeroed`].
    pub fn copied<T: Element>(&self, values: &[T]) -> Result<Buffer<T>, CudaError> {
        let mut buffer = self.zeroed(values.len())?;
        self.write(&mut buffer, 0, values)?;
        Ok(buffer)
    }

    /// Writes `values` into `buffer` from `start` on. The values are read before this returns.
    ///
    /// # Errors
    /// When they do not fit, or a graph is being recorded.
    pub fn write<T: Element>(
        &self,
        buffer: &mut Buffer<T>,
        start: usize,
        values: &[T],
    ) -> Result<(), CudaError> {
        self.not_recording("copy from the host")?;
        within("write", start, values.len(), buffer.len())?;
        self.bind()?;
        let to = buffer.address(self) + (start * size_of::<T>()) as u64;
        // SAFETY: the range lies in the buffer, which lives. Pageable memory is read before the call returns.
        unsafe { result::memcpy_htod_async(to, values, self.stream().cu_stream()) }
            .tried("copy to the device")
    }

    /// All of `buffer`, after what was launched before has written it.
    ///
    /// # Errors
    /// When the copy or what was launched before failed.
    pub fn read<T: Element>(&self, buffer: &Buffer<T>) -> Result<Vec<T>, CudaError> {
        self.not_recording("copy to the host")?;
        self.bind()?;
        // SAFETY: zero is a value of every element.
        let mut values = vec![unsafe { std::mem::zeroed::<T>() }; buffer.len()];
        let from = buffer.address(self);
        // SAFETY: both hold as many values, and live until the copy has ended below.
        unsafe { result::memcpy_dtoh_async(&mut values, from, self.stream().cu_stream()) }
            .tried("copy to the host")?;
        self.synchronize()?;
        Ok(values)
    }

    /// Zeroes `len` values of `buffer` from `start` on.
    ///
    /// # Errors
    /// When the range is not in the buffer.
    pub fn clear<T: Element>(
        &self,
        buffer: &mut Buffer<T>,
        start: usize,
        len: usize,
    ) -> Result<(), CudaError> {
        within("clear", start, len, buffer.len())?;
        self.bind()?;
        let at = buffer.address(self) + (start * size_of::<T>()) as u64;
        // SAFETY: the range lies in the buffer, which lives; zero is a value of every element.
        unsafe { result::memset_d8_async(at, 0, len * size_of::<T>(), self.stream().cu_stream()) }
            .tried("clear memory")
    }

    /// Host memory for what a step brings: written by the host, copied while the host goes on.
    ///
    /// # Errors
    /// When the system has no room.
    pub fn pinned<T: Element>(&self, len: usize) -> Result<Pinned<T>, CudaError> {
        let event = self.context().new_event(None).tried("make an event")?;
        Ok(Pinned {
            slice: self.pinned_zeroes(len)?,
            event,
        })
    }

    /// Host memory for what a step leaves.
    ///
    /// # Errors
    /// When the system has no room.
    pub fn readback<T: Element>(&self, len: usize) -> Result<Readback<T>, CudaError> {
        let event = self.context().new_event(None).tried("make an event")?;
        Ok(Readback {
            slice: self.pinned_zeroes(len)?,
            event,
            len: 0,
        })
    }

    fn pinned_zeroes<T: Element>(&self, len: usize) -> Result<PinnedHostSlice<T>, CudaError> {
        // SAFETY: the memory is zeroed before anything reads it.
        let slice = unsafe { self.context().alloc_pinned_with_flags::<T>(len.max(1), 0) };
        let mut slice = slice.tried("pin host memory")?;
        let start = slice.as_mut_ptr().tried("pin host memory")?;
        // SAFETY: `start` is the address of `len` elements that nobody else knows; zero is a value of every element.
        unsafe { std::ptr::write_bytes(start, 0, len.max(1)) };
        Ok(slice)
    }

    /// Starts to copy the first `len` values of `from` to `to`, from its value `start` on.
    ///
    /// # Errors
    /// When they do not fit, or a graph is being recorded.
    pub fn upload<T: Element>(
        &self,
        to: &mut Buffer<T>,
        start: usize,
        from: &Pinned<T>,
        len: usize,
    ) -> Result<(), CudaError> {
        self.not_recording("copy from the host")?;
        within("upload", start, len, to.len())?;
        within("upload", 0, len, from.slice.len())?;
        self.bind()?;
        let address = to.address(self) + (start * size_of::<T>()) as u64;
        // SAFETY: this memory waits for the event, recorded below, before it is written, read or freed.
        let values = unsafe { from.values_unwaited() }?;
        // SAFETY: the range lies in both, and both live until the copy has ended.
        unsafe { result::memcpy_htod_async(address, &values[..len], self.stream().cu_stream()) }
            .tried("copy to the device")?;
        from.event.record(self.stream()).tried("record an event")
    }

    /// Starts to copy the first `len` values of `from`, as they are after what was launched before.
    ///
    /// # Errors
    /// When they do not fit, or a graph is being recorded.
    pub fn download<T: Element>(
        &self,
        to: &mut Readback<T>,
        from: &Buffer<T>,
        len: usize,
    ) -> Result<(), CudaError> {
        self.not_recording("copy to the host")?;
        within("download", 0, len, from.len().min(to.slice.len()))?;
        self.bind()?;
        to.len = len;
        if len == 0 {
            return to.event.record(self.stream()).tried("record an event");
        }
        let address = from.address(self);
        let to_start = to.slice.as_mut_ptr().tried("copy to the host")?;
        // SAFETY: `len` was checked; the memory is this buffer's, which waits for the event before it is read or freed.
        let values = unsafe { std::slice::from_raw_parts_mut(to_start, len) };
        // SAFETY: as above, and the range lies in both.
        unsafe { result::memcpy_dtoh_async(values, address, self.stream().cu_stream()) }
            .tried("copy to the host")?;
        to.event.record(self.stream()).tried("record an event")
    }
}

fn within(
    operation: &'static str,
    start: usize,
    len: usize,
    holds: usize,
) -> Result<(), CudaError> {
    let fits = start.checked_add(len).is_some_and(|end| end <= holds);
    let rule = || format!("must lie within {holds} values, from {start} on");
    fits.then_some(()).ok_or_else(|| CudaError::Shape {
        operation,
        name: "len",
        rule: rule(),
        got: len,
    })
}

/// Host memory that the device reads by itself.
pub struct Pinned<T: Element> {
    slice: PinnedHostSlice<T>,
    /// The end of the last upload. cudarc's own is not recorded where events are not tracked.
    event: CudaEvent,
}

impl<T: Element> Pinned<T> {
    /// The values, after the last upload from here has read them.
    ///
    /// # Errors
    /// When that upload failed.
    pub fn values(&mut self) -> Result<&mut [T], CudaError> {
        self.event.synchronize().tried("wait for a copy")?;
        self.slice.as_mut_slice().tried("wait for a copy")
    }

    /// The values, which an upload may be reading.
    ///
    /// # Safety
    /// They must not be written before the event of that upload.
    unsafe fn values_unwaited(&self) -> Result<&[T], CudaError> {
        // The slice's own event is never recorded, so this waits for nothing.
        self.slice.as_slice().tried("find pinned memory")
    }
}

impl<T: Element> Drop for Pinned<T> {
    fn drop(&mut self) {
        // A copy that failed reads nothing any more.
        let _ended = self.event.synchronize();
    }
}

/// Host memory that the device writes by itself.
pub struct Readback<T: Element> {
    slice: PinnedHostSlice<T>,
    event: CudaEvent,
    len: usize,
}

impl<T: Element> Readback<T> {
    /// Whether the copy has arrived.
    ///
    /// # Errors
    /// When it, or what was launched before it, failed.
    pub fn is_ready(&self) -> Result<bool, CudaError> {
        self.event
            .try_is_complete()
            .tried("tell whether a copy has arrived")
    }

    /// Waits for the copy. The driver ends the wait with an error when the device is lost.
    ///
    /// # Errors
    /// As [`Self::is_ready`].
    pub fn wait(&self) -> Result<&[T], CudaError> {
        self.event.synchronize().tried("wait for a copy")?;
        Ok(&self.slice.as_slice().tried("wait for a copy")?[..self.len])
    }
}

impl<T: Element> Drop for Readback<T> {
    fn drop(&mut self) {
        // A copy that failed writes nothing any more.
        let _ended = self.event.synchronize();
    }
}
