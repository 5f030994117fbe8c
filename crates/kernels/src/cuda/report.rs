//! What `espalier doctor` says about GPUs. Looks only; opens no context and takes no memory.

#![expect(unsafe_code, reason = "the driver is a C library")]

use std::path::{Path, PathBuf};

use cudarc::driver::{result, sys};

use super::error::CudaError;
use super::{compile, device, library};

/// What was found.
#[derive(Debug, Clone)]
pub struct Report {
    /// The driver and its devices; nothing where there is no libcuda.
    pub driver: Option<Driver>,
    /// Version of NVRTC.
    pub nvrtc: Option<(u32, u32)>,
    /// Version of cuBLASLt, as the library numbers itself.
    pub cublaslt: Option<usize>,
    /// Version of cuDNN, as the library numbers itself.
    pub cudnn_version: Option<usize>,
}

/// One of NVIDIA's libraries.
#[derive(Debug, Clone)]
pub struct Library {
    /// What it is called.
    pub name: &'static str,
    /// Its version, where it tells.
    pub version: Option<String>,
    /// The file that was opened.
    pub path: Option<PathBuf>,
    /// Why it is needed and what brings it, where it is missing.
    pub missing: Option<String>,
}

/// The driver.
#[derive(Debug, Clone)]
pub struct Driver {
    /// The newest CUDA that it serves.
    pub cuda: (u32, u32),
    /// Its own version, where the kernel module tells.
    pub version: Option<String>,
    /// Its devices, or why there are none.
    pub devices: Result<Vec<DeviceFound>, String>,
}

/// One GPU.
#[derive(Debug, Clone)]
pub struct DeviceFound {
    /// N of `cuda:N`.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// All of its memory.
    pub memory_bytes: usize,
}

impl Report {
    /// The libraries, in the order in which they are needed.
    pub fn libraries(&self) -> [Library; 3] {
        let driver = self.driver.as_ref().map(|driver| {
            let own = driver.version.as_deref().unwrap_or("of unknown version");
            format!("{own}, for CUDA up to {}.{}", driver.cuda.0, driver.cuda.1)
        });
        let nvrtc = self.nvrtc.map(|(major, minor)| format!("{major}.{minor}"));
        let cublaslt = self.cublaslt.map(|version| {
            let (major, rest) = (version / 10_000, version % 10_000);
            format!("{major}.{}.{}", rest / 100, rest % 100)
        });
        [
            found("libcuda", "libcuda.so", driver, library::need_driver()),
            found("NVRTC", "libnvrtc.so", nvrtc, library::need_nvrtc()),
            found(
                "cuBLASLt",
                "libcublasLt.so",
                cublaslt,
                library::need_cublaslt(),
            ),
        ]
    }

    /// The library that attends to long documents in training. Without it a kernel of this crate does, slower.
    pub fn cudnn(&self) -> Library {
        let version = self.cudnn_version.map(|version| {
            let (major, rest) = (version / 10_000, version % 10_000);
            format!("{major}.{}.{}", rest / 100, rest % 100)
        });
        found("cuDNN", "libcudnn.so", version, library::need_cudnn())
    }

    /// Whether a GPU is here on which cuDNN's attention would train.
    pub fn attends_by_cudnn(&self) -> bool {
        let devices = self.driver.as_ref().map(|driver| driver.devices.as_ref());
        let devices = devices.and_then(Result::ok).into_iter().flatten();
        let mut capabilities = devices.map(|device| device.capability.0);
        library::need_cudnn().is_ok() && capabilities.any(|major| major == device::HOPPER)
    }

    /// The device of that number, if models can run on it.
    ///
    /// # Errors
    /// The first thing that is in the way, as opening the device would say.
    pub fn usable(&self, ordinal: usize) -> Result<&DeviceFound, String> {
        if let Some(missing) = self
            .libraries()
            .into_iter()
            .find_map(|library| library.missing)
        {
            return Err(missing);
        }
        let devices = self.driver.as_ref().map(|driver| driver.devices.as_ref());
        let devices = devices.transpose().map_err(Clone::clone)?;
        let devices = devices.map(Vec::as_slice).unwrap_or_default();
        let device = devices.get(ordinal).ok_or_else(|| {
            let count = devices.len();
            CudaError::NoDevice { ordinal, count }.to_string()
        })?;
        device::check_capability(ordinal, device.capability).map_err(|error| error.to_string())?;
        Ok(device)
    }
}

fn found(
    name: &'static str,
    file: &str,
    version: Option<String>,
    need: Result<(), CudaError>,
) -> Library {
    let opened = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    Library {
        name,
        version,
        path: mapped(&opened, file),
        missing: need.err().map(|error| error.to_string()),
    }
}

/// The file of a library that this process has open, from the list of its mappings.
fn mapped(mappings: &str, file: &str) -> Option<PathBuf> {
    let paths = mappings
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]));
    let mut files = paths.map(Path::new).filter(|path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with(file)
    });
    files.next().map(Path::to_owned)
}

/// Looks at the machine. Call [`library::look_in`] first where libraries lie in folders of their own.
pub fn look() -> Report {
    // SAFETY: the library was found; the call takes nothing and only returns a number.
    let cublaslt =
        library::cublaslt_present().then(|| unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() });
    Report {
        driver: library::driver_present().then(driver),
        nvrtc: compile::nvrtc_version().ok(),
        cublaslt,
        cudnn_version: library::cudnn_version(),
    }
}

fn driver() -> Driver {
    let mut cuda = 0;
    // SAFETY: writes one int; may be called before `cuInit`.
    let known = unsafe { sys::cuDriverGetVersion(&mut cuda) }
        .result()
        .is_ok();
    let cuda = if known {
        (cuda as u32 / 1000, cuda as u32 % 1000 / 10)
    } else {
        (0, 0)
    };
    Driver {
        cuda,
        version: kernel_module(),
        devices: devices().map_err(|e| e.to_string()),
    }
}

/// The driver's version from the kernel module's first line, "NVRM version: … Kernel Module  580.159.04 …".
fn kernel_module() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let dotted =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.lines()
        .next()?
        .split_whitespace()
        .find(dotted)
        .map(str::to_owned)
}

fn devices() -> Result<Vec<DeviceFound>, result::DriverError> {
    result::init()?;
    (0..result::device::get_count()?).map(device).collect()
}

fn device(ordinal: i32) -> Result<DeviceFound, result::DriverError> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    };
    let handle = result::device::get(ordinal)?;
    // SAFETY: `handle` is a device that the driver has just named.
    let attribute = |a| unsafe { result::device::get_attribute(handle, a) };
    let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32;
    let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32;
    // SAFETY: as above.
    let memory_bytes = unsafe { result::device::total_mem(handle) }?;
    Ok(DeviceFound {
        ordinal: ordinal as usize,
        name: result::device::get_name(handle)?,
        capability: (major, minor),
        memory_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_library_is_found_among_the_mappings() {
        let mappings = "\
7f00-7f10 r--p 00000000 00:2a 12  /usr/lib/libc.so.6
7f10-7f20 rw-p 00000000 00:00 0
7f20-7f30 r-xp 00000000 00:2a 13  /opt/my cuda/libnvrtc.so.13
";
        let found = mapped(mappings, "libnvrtc.so");
        assert_eq!(
            found.as_deref(),
            Some(Path::new("/opt/my cuda/libnvrtc.so.13"))
        );
        assert_eq!(mapped(mappings, "libcuda.so"), None);
    }

    #[test]
    fn what_is_missing_is_said_with_what_brings_it() {
        let report = look();
        for library in report.libraries() {
            assert_eq!(
                library.version.is_some(),
                library.missing.is_none(),
                "{library:?}"
            );
            if let Some(missing) = &library.missing {
                assert!(missing.contains("install"), "{missing}");
                assert!(report.usable(0).is_err());
            }
        }
        assert!(report.usable(1_000).is_err());
        if let Some(missing) = report.cudnn().missing {
            assert!(missing.contains("install"), "{missing}");
            assert!(!report.attends_by_cudnn());
        }
    }
}
