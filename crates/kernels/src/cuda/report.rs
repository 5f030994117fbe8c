//! What `espalier doctor` says about GPUs. Looks only; opens no context and takes no memory.

#![expect(unsafe_code, reason = "the driver is a C library")]

use std::fmt;

use cudarc::driver::{result, sys};

use super::{compile, library};

/// What was found.
#[derive(Debug, Clone)]
pub struct Report {
    /// The driver and its devices; nothing where there is no libcuda.
    pub driver: Option<Driver>,
    /// Version of NVRTC.
    pub nvrtc: Option<(u32, u32)>,
    /// Version of cuBLASLt, as the library numbers itself.
    pub cublaslt: Option<usize>,
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

/// Looks at the machine. Call [`library::look_in`] first where libraries lie in folders of their own.
pub fn look() -> Report {
    // SAFETY: the library was found; the call takes nothing and only returns a number.
    let cublaslt =
        library::cublaslt_present().then(|| unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() });
    Report {
        driver: library::driver_present().then(driver),
        nvrtc: compile::nvrtc_version().ok(),
        cublaslt,
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

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            None => writeln!(f, "CUDA driver: not found (no libcuda)")?,
            Some(driver) => write!(f, "{driver}")?,
        }
        match self.nvrtc {
            None => writeln!(f, "NVRTC: not found; kernels cannot be compiled")?,
            Some((major, minor)) => writeln!(f, "NVRTC: {major}.{minor}")?,
        }
        match self.cublaslt {
            None => writeln!(f, "cuBLASLt: not found; matrices cannot be multiplied"),
            Some(version) => writeln!(
                f,
                "cuBLASLt: {}.{}.{}",
                version / 10_000,
                version / 100 % 100,
                version % 100
            ),
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = self.version.as_deref().unwrap_or("of unknown version");
        writeln!(
            f,
            "CUDA driver: {version}, for CUDA up to {}.{}",
            self.cuda.0, self.cuda.1
        )?;
        match &self.devices {
            Err(reason) => writeln!(f, "  no device: {reason}"),
            Ok(devices) => devices.iter().try_for_each(|d| {
                let (major, minor) = d.capability;
                let gib = d.memory_bytes as f64 / (1u64 << 30) as f64;
                writeln!(
                    f,
                    "  cuda:{} {}, compute capability {major}.{minor}, {gib:.1} GiB",
                    d.ordinal, d.name
                )
            }),
        }
    }
}
