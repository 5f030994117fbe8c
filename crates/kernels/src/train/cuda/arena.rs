//! Buffers by id: on the device, and pinned on the host for what is moved away and back.

#![expect(unsafe_code, reason = "pinned memory is taken from the driver")]

use cudarc::driver::{CudaEvent, PinnedHostSlice};

use super::super::{BufferId, Kind, Mat, MemoryUse, OutOfMemory, Slice};
use crate::cuda::buffer::Buffer;
use crate::cuda::device::Device;
use crate::cuda::error::{CudaError, Tried};

/// Host memory that the device copies from and to by itself.
pub(super) struct Host {
    memory: PinnedHostSlice<u8>,
    /// The end of the last copy.
    pub(super) moved: CudaEvent,
}

impl Host {
    fn new(device: &Device, bytes: usize) -> Result<Self, CudaError> {
        // SAFETY: it is only ever written and read by copies of the device, read after it was written.
        let memory = unsafe { device.context().alloc_pinned_with_flags(bytes.max(1), 0) };
        Ok(Self {
            memory: memory.tried(format!("pin {bytes} bytes of host memory"))?,
            moved: device.context().new_event(None).tried("make an event")?,
        })
    }

    pub(super) fn address(&mut self) -> Result<*mut u8, CudaError> {
        self.memory.as_mut_ptr().tried("find pinned memory")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A copy that failed reads and writes nothing any more.
        let _ended = self.moved.synchronize();
    }
}

enum Place {
    Device(Buffer<u8>),
    Host(Host),
    Free,
}

struct Entry {
    place: Place,
    kind: Kind,
    len: usize,
}

impl Entry {
    fn bytes(&self) -> u64 {
        (self.len * element_bytes(self.kind)) as u64
    }
}

/// Bytes of an element.
pub(super) fn element_bytes(kind: Kind) -> usize {
    match kind {
        Kind::Weights | Kind::Activations => 2,
        Kind::Exact | Kind::Ids => 4,
        Kind::Bytes => 1,
    }
}

/// All buffers.
#[derive(Default)]
pub(super) struct Arena {
    entries: Vec<Entry>,
    free: Vec<u32>,
    memory: MemoryUse,
}

impl Arena {
    pub(super) fn alloc(
        &mut self,
        device: &Device,
        kind: Kind,
        len: usize,
        on_host: bool,
    ) -> Result<BufferId, OutOfMemory> {
        let bytes = len.saturating_mul(element_bytes(kind));
        let place = match on_host {
            true => Host::new(device, bytes).map(Place::Host),
            false => device.zeroed(bytes).map(Place::Device),
        };
        let place = place.map_err(|error| OutOfMemory {
            bytes: bytes as u64,
            source: std::io::Error::other(error),
        })?;
        if on_host {
            self.memory.host += bytes as u64;
        } else {
            self.memory.device += bytes as u64;
            self.memory.device_peak = self.memory.device_peak.max(self.memory.device);
        }
        let entry = Entry { place, kind, len };
        Ok(BufferId(match self.free.pop() {
            Some(id) => {
                self.entries[id as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        }))
    }

    pub(super) fn release(&mut self, id: BufferId) {
        let entry = &mut self.entries[id.0 as usize];
        match std::mem::replace(&mut entry.place, Place::Free) {
            Place::Device(_) => self.memory.device -= entry.bytes(),
            Place::Host(_) => self.memory.host -= entry.bytes(),
            Place::Free => panic!("{id:?} is not there"),
        }
        self.free.push(id.0);
    }

    pub(super) fn memory(&self) -> MemoryUse {
        self.memory
    }

    pub(super) fn kind(&self, id: BufferId) -> Kind {
        self.entries[id.0 as usize].kind
    }

    pub(super) fn len(&self, id: BufferId) -> usize {
        self.entries[id.0 as usize].len
    }

    /// A buffer's memory on the device.
    pub(super) fn buffer(&mut self, id: BufferId) -> &mut Buffer<u8> {
        match &mut self.entries[id.0 as usize].place {
            Place::Device(buffer) => buffer,
            Place::Host(_) | Place::Free => panic!("{id:?} is not on the device"),
        }
    }

    /// A buffer's memory on the host.
    pub(super) fn host(&mut self, id: BufferId) -> &mut Host {
        match &mut self.entries[id.0 as usize].place {
            Place::Host(host) => host,
            Place::Device(_) | Place::Free => panic!("{id:?} is not on the host"),
        }
    }

    /// Address of `len` elements from `start` on, which are of one of `kinds`.
    fn address(
        &self,
        device: &Device,
        (id, start, len): (BufferId, usize, usize),
        kinds: &[Kind],
    ) -> u64 {
        let entry = &self.entries[id.0 as usize];
        assert!(kinds.contains(&entry.kind), "{id:?} holds {:?}", entry.kind);
        let fits = start.checked_add(len).is_some_and(|end| end <= entry.len);
        assert!(fits, "{len} from {start} on of {} of {id:?}", entry.len);
        match &entry.place {
            Place::Device(buffer) => {
                buffer.address(device) + (start * element_bytes(entry.kind)) as u64
            }
            Place::Host(_) | Place::Free => panic!("{id:?} is not on the device"),
        }
    }

    /// Address of a matrix of numbers that flow or are multiplied.
    pub(super) fn narrow(&self, device: &Device, mat: Mat) -> u64 {
        let all = (mat.buffer, mat.start, mat.span());
        self.address(device, all, &[Kind::Weights, Kind::Activations])
    }

    /// Address of a matrix of exact numbers.
    pub(super) fn exact(&self, device: &Device, mat: Mat) -> u64 {
        self.address(device, (mat.buffer, mat.start, mat.span()), &[Kind::Exact])
    }

    /// Address of a matrix of any numbers.
    pub(super) fn numbers(&self, device: &Device, mat: Mat) -> u64 {
        let all = (mat.buffer, mat.start, mat.span());
        self.address(
            device,
            all,
            &[Kind::Weights, Kind::Activations, Kind::Exact],
        )
    }

    /// Address of neighbouring elements of one kind.
    pub(super) fn slice(&self, device: &Device, slice: Slice, kind: Kind) -> u64 {
        self.address(device, (slice.buffer, slice.start, slice.len), &[kind])
    }

    /// Address of the first `len` elements of a buffer of one kind.
    pub(super) fn first(&self, device: &Device, id: BufferId, len: usize, kind: Kind) -> u64 {
        self.address(device, (id, 0, len), &[kind])
    }
}
