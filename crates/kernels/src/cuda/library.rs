//! Which of NVIDIA's libraries are here. Nothing else of this module may be called before `driver_present`, `nvrtc_present`,
//! `cublaslt_present` or `cudnn_version` has said yes: cudarc panics at the first call into a library that it cannot open.

#![expect(unsafe_code, reason = "libraries are opened by name")]

use std::path::{Path, PathBuf};

use libloading::Library;

use super::cudnn::VERSION_MIN;
use super::error::CudaError;

/// Where toolkits put their libraries, besides the loader's own places.
const FOLDERS: [&str; 3] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/opt/cuda/lib64",
];

struct Wanted {
    present: fn() -> bool,
    /// How its files begin, after those of what it opens itself by name.
    files: &'static [&'static str],
}

const WANTED: [Wanted; 3] = [
    Wanted {
        present: nvrtc_present,
        files: &["libnvrtc-builtins.so.", "libnvrtc.so."],
    },
    Wanted {
        present: cublaslt_present,
        files: &["libcublasLt.so."],
    },
    Wanted {
        present: cudnn_present,
        files: &["libcudnn.so."],
    },
];

/// Opens NVRTC, cuBLASLt and cuDNN from `folders` or a toolkit's usual place, where the loader does not find them by itself. The
/// loader gives later callers what is open under the name that they ask for, so `LD_LIBRARY_PATH` need not be set: a
/// wheel's `nvidia/cu13/lib` can be named as it is. Returns the folders of which a library was opened.
pub fn look_in(folders: &[PathBuf]) -> Vec<PathBuf> {
    let usual = FOLDERS.iter().map(PathBuf::from);
    let folders: Vec<PathBuf> = folders
        .iter()
        .cloned()
        .chain(usual)
        .filter(|f| f.is_dir())
        .collect();
    let mut opened = Vec::new();
    for library in &WANTED {
        // Looked for again after each folder: the first that has it is enough.
        for folder in &folders {
            if !(library.present)() && library.files.iter().all(|start| open_first(folder, start)) {
                opened.push(folder.clone());
            }
        }
    }
    opened.dedup();
    opened
}

/// Opens the newest file of `folder` whose name begins with `start`, for the rest of the process.
fn open_first(folder: &Path, start: &str) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(start))
        })
        .collect();
    names.sort();
    names.iter().rev().any(|path| {
        // SAFETY: the initialisers of NVIDIA's own libraries run; they expect nothing of the process. The library is kept
        // open for ever, so nothing of it is used after it is gone.
        let library = unsafe { Library::new(path) };
        library.map(std::mem::forget).is_ok()
    })
}

/// Whether the driver's library (libcuda) can be opened.
pub fn driver_present() -> bool {
    // SAFETY: opens and closes the library.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Whether NVRTC can be opened.
pub fn nvrtc_present() -> bool {
    // SAFETY: opens and closes the library.
    unsafe { cudarc::nvrtc::sys::is_culib_present() }
}

/// Whether cuBLASLt can be opened.
pub fn cublaslt_present() -> bool {
    // SAFETY: opens and closes the library.
    unsafe { cudarc::cublaslt::sys::is_culib_present() }
}

fn cudnn_present() -> bool {
    // SAFETY: opens and closes the library.
    unsafe { cudarc::cudnn::sys::is_culib_present() }
}

/// Version of cuDNN as it numbers itself, such as 91400 for 9.14.0; none: it cannot be opened.
pub fn cudnn_version() -> Option<usize> {
    // SAFETY: the library was found; the call takes nothing and only returns a number.
    cudnn_present().then(|| unsafe { cudarc::cudnn::sys::cudnnGetVersion() })
}

/// Refuses to go on without a cuDNN that was tried.
pub(super) fn need_cudnn() -> Result<(), CudaError> {
    let (library, purpose) = ("libcudnn.so", "which attends to long documents in training");
    let remedy = "`pip install nvidia-cudnn-cu13` and name its lib folder in LD_LIBRARY_PATH";
    match cudnn_version() {
        None => Err(CudaError::Missing {
            library,
            purpose,
            remedy,
        }),
        Some(version) if version < VERSION_MIN => Err(CudaError::OldCudnn { version }),
        Some(_) => Ok(()),
    }
}

/// Refuses to go on without the driver.
pub(super) fn need_driver() -> Result<(), CudaError> {
    let (library, purpose) = ("libcuda.so", "which speaks to the GPU");
    let remedy = "install NVIDIA's driver, or start the container with the GPU";
    driver_present().then_some(()).ok_or(CudaError::Missing {
        library,
        purpose,
        remedy,
    })
}

/// Refuses to go on without NVRTC.
pub(super) fn need_nvrtc() -> Result<(), CudaError> {
    let (library, purpose) = ("libnvrtc.so", "which compiles the kernels");
    let remedy = "install the CUDA toolkit 13, or `pip install nvidia-cuda-nvrtc` and name its lib folder in LD_LIBRARY_PATH";
    nvrtc_present().then_some(()).ok_or(CudaError::Missing {
        library,
        purpose,
        remedy,
    })
}

/// Refuses to go on without cuBLASLt.
pub(super) fn need_cublaslt() -> Result<(), CudaError> {
    let (library, purpose) = ("libcublasLt.so", "which multiplies matrices");
    let remedy = "install the CUDA toolkit 13, or `pip install nvidia-cublas` and name its lib folder in LD_LIBRARY_PATH";
    cublaslt_present().then_some(()).ok_or(CudaError::Missing {
        library,
        purpose,
        remedy,
    })
}
