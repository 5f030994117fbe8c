//! Large memory: files that are mapped, and zeroed pages for weights and the KV cache. Aligned to pages, on huge pages
//! where the system has them, and not touched before they are written.

#![expect(
    unsafe_code,
    reason = "bytes of a map are seen as numbers, and a file is mapped"
)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::path::Path;

use memmap2::{Mmap, MmapMut};

/// Types of which every bit pattern is a value.
pub trait Plain: Copy + Send + Sync + private::Sealed {}

mod private {
    pub trait Sealed {}
}

macro_rules! plain {
    ($($name:ty),*) => { $(impl private::Sealed for $name {} impl Plain for $name {})* };
}
plain!(u8, i8, u16, u32, f32, f64, half::bf16);

/// `len` zeroes of `T`, aligned to a page.
pub struct Buffer<T: Plain> {
    map: Option<MmapMut>,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// Zeroes; pages are taken from the system when they are first written.
    ///
    /// # Errors
    /// When the system has no room for them.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| io::Error::other(format!("a buffer of {len} elements overflows")))?;
        let map = if bytes == 0 {
            None
        } else {
            let map = MmapMut::map_anon(bytes)?;
            #[cfg(target_os = "linux")]
            if bytes >= 4 << 20 {
                // A hint: without huge pages the same numbers come, slower.
                let _unsupported = map.advise(memmap2::Advice::HugePage);
            }
            Some(map)
        };
        Ok(Self {
            map,
            len,
            of: PhantomData,
        })
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &self.map {
            // SAFETY: the map holds `len` elements, is aligned to a page, and every bit pattern is a `T`.
            Some(map) => unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), self.len) },
            None => &[],
        }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.map {
            // SAFETY: as above, and `self` is borrowed mutably.
            Some(map) => unsafe {
                std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), self.len)
            },
            None => &mut [],
        }
    }
}

/// A file, mapped to be read.
pub struct MappedFile(Option<Mmap>);

impl MappedFile {
    /// Maps the whole file.
    ///
    /// # Errors
    /// When it cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: checkpoints are not written while they are served. Should one be, numbers change or the process gets
        // SIGBUS; no reference to anything but plain bytes is made.
        Ok(Self(Some(unsafe { Mmap::map(&file) }?)))
    }
}

impl Deref for MappedFile {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
