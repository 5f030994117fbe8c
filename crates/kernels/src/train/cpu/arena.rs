//! Buffers by id. An op takes what it writes out of the arena while it borrows what it reads.

use super::super::real::Real;
use super::super::{BufferId, Kind, Mat, MemoryUse, OutOfMemory, Slice};
use crate::buffer::Buffer;

/// A buffer's numbers.
pub(crate) enum Data<T: Real> {
    Real(Buffer<T>),
    Ids(Buffer<u32>),
    Bytes(Buffer<u8>),
    /// Taken by an op that is writing it, or freed.
    Absent,
}

struct Entry<T: Real> {
    data: Data<T>,
    kind: Kind,
    bytes: u64,
    on_host: bool,
}

/// All buffers.
pub(crate) struct Arena<T: Real> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
    memory: MemoryUse,
}

impl<T: Real> Arena<T> {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            memory: MemoryUse::default(),
        }
    }

    pub(crate) fn element_bytes(kind: Kind) -> u64 {
        match kind {
            Kind::Weights | Kind::Activations | Kind::Exact => size_of::<T>() as u64,
            Kind::Ids => 4,
            Kind::Bytes => 1,
        }
    }

    pub(crate) fn alloc(
        &mut self,
        kind: Kind,
        len: usize,
        on_host: bool,
    ) -> Result<BufferId, OutOfMemory> {
        let bytes = Self::element_bytes(kind).saturating_mul(len as u64);
        let failed = |source| OutOfMemory { bytes, source };
        let data = match kind {
            Kind::Ids => Data::Ids(Buffer::zeroed(len).map_err(failed)?),
            Kind::Bytes => Data::Bytes(Buffer::zeroed(len).map_err(failed)?),
            _ => Data::Real(Buffer::zeroed(len).map_err(failed)?),
        };
        let entry = Entry {
            data,
            kind,
            bytes,
            on_host,
        };
        if on_host {
            self.memory.host += bytes;
        } else {
            self.memory.device += bytes;
            self.memory.device_peak = self.memory.device_peak.max(self.memory.device);
        }
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

    pub(crate) fn release(&mut self, id: BufferId) {
        let entry = &mut self.entries[id.0 as usize];
        assert!(!matches!(entry.data, Data::Absent), "{id:?} is not there");
        entry.data = Data::Absent;
        if entry.on_host {
            self.memory.host -= entry.bytes;
        } else {
            self.memory.device -= entry.bytes;
        }
        self.free.push(id.0);
    }

    pub(crate) fn memory(&self) -> MemoryUse {
        self.memory
    }

    pub(crate) fn real(&self, id: BufferId) -> &[T] {
        match &self.entries[id.0 as usize].data {
            Data::Real(data) => data,
            _ => panic!("{id:?} holds no numbers, or is being written"),
        }
    }

    pub(crate) fn real_mut(&mut self, id: BufferId) -> &mut [T] {
        match &mut self.entries[id.0 as usize].data {
            Data::Real(data) => data,
            _ => panic!("{id:?} holds no numbers, or is being written"),
        }
    }

    pub(crate) fn ids(&self, id: BufferId) -> &[u32] {
        match &self.entries[id.0 as usize].data {
            Data::Ids(data) => data,
            _ => panic!("{id:?} holds no ids"),
        }
    }

    pub(crate) fn ids_mut(&mut self, id: BufferId) -> &mut [u32] {
        match &mut self.entries[id.0 as usize].data {
            Data::Ids(data) => data,
            _ => panic!("{id:?} holds no ids"),
        }
    }

    pub(crate) fn bytes(&self, id: BufferId) -> &[u8] {
        match &self.entries[id.0 as usize].data {
            Data::Bytes(data) => data,
            _ => panic!("{id:?} holds no bytes"),
        }
    }

    pub(crate) fn bytes_mut(&mut self, id: BufferId) -> &mut [u8] {
        match &mut self.entries[id.0 as usize].data {
            Data::Bytes(data) => data,
            _ => panic!("{id:?} holds no bytes"),
        }
    }

    /// Numbers of a matrix, from its first element to its last.
    pub(crate) fn mat(&self, mat: Mat) -> &[T] {
        &self.real(mat.buffer)[mat.start..mat.start + mat.span()]
    }

    pub(crate) fn slice(&self, slice: Slice) -> &[T] {
        &self.real(slice.buffer)[slice.start..slice.start + slice.len]
    }

    /// Takes a buffer out to be written; [`Arena::put`] brings it back.
    pub(crate) fn take(&mut self, id: BufferId) -> Taken<T> {
        let entry = &mut self.entries[id.0 as usize];
        match std::mem::replace(&mut entry.data, Data::Absent) {
            Data::Real(data) => Taken { id, data },
            _ => panic!("{id:?} holds no numbers, or is being written"),
        }
    }

    pub(crate) fn put(&mut self, taken: Taken<T>) {
        self.entries[taken.id.0 as usize].data = Data::Real(taken.data);
    }

    /// Exchanges the content of two buffers of one kind and length.
    pub(crate) fn swap(&mut self, a: BufferId, b: BufferId) {
        let (a, b) = (a.0 as usize, b.0 as usize);
        let same = |x: &Entry<T>, y: &Entry<T>| x.kind == y.kind && x.bytes == y.bytes;
        assert!(a != b && same(&self.entries[a], &self.entries[b]));
        let held = std::mem::replace(&mut self.entries[a].data, Data::Absent);
        self.entries[a].data = std::mem::replace(&mut self.entries[b].data, held);
    }
}

/// A buffer that an op writes.
pub(crate) struct Taken<T: Real> {
    id: BufferId,
    data: Buffer<T>,
}

impl<T: Real> Taken<T> {
    pub(crate) fn mat(&mut self, mat: Mat) -> &mut [T] {
        &mut self.data[mat.start..mat.start + mat.span()]
    }

    pub(crate) fn slice(&mut self, slice: Slice) -> &mut [T] {
        &mut self.data[slice.start..slice.start + slice.len]
    }
}
