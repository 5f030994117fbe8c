//! What models can run on here, for whoever wants to know before one is loaded.

use espalier_kernels::AUTO_ORDINAL;
use espalier_kernels::cpu::Isa;
use espalier_kernels::cuda::{library, report};

pub use espalier_kernels::cuda::report::{DeviceFound, Library};

use espalier_runtime::memory::available;

/// What was found.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The instructions that the CPU's kernels use.
    pub instructions: &'static str,
    /// Whether those are vectors; without them the CPU is of little use.
    pub has_vectors: bool,
    /// Threads that compute, without being told.
    pub threads: usize,
    /// Memory that this process can still take.
    pub memory_bytes: u64,
    /// What a GPU needs.
    pub libraries: [Library; 3],
    /// What trains faster on a GPU where it is.
    pub cudnn: Library,
    /// All that the driver shows, or why it shows none. None: there is no driver.
    pub gpus: Option<Result<Vec<DeviceFound>, String>>,
    /// The GPU that `--device auto` takes, or why it takes the CPU.
    pub auto: Result<DeviceFound, String>,
    /// Those that models can run on.
    pub usable: Vec<DeviceFound>,
}

/// Looks. Takes no memory of a GPU. The driver may take seconds.
pub fn survey() -> Survey {
    library::look_in(&[]);
    let report = report::look();
    let isa = Isa::detect();
    let devices = report.driver.iter().flat_map(|driver| &driver.devices);
    let devices = devices.flatten();
    let usable = devices.filter(|device| report.usable(device.ordinal).is_ok());
    Survey {
        instructions: isa.name(),
        has_vectors: isa != Isa::Portable,
        threads: super::threads(None),
        memory_bytes: available(),
        libraries: report.libraries(),
        cudnn: report.cudnn(),
        auto: report.usable(AUTO_ORDINAL as usize).cloned(),
        usable: usable.cloned().collect(),
        gpus: report.driver.map(|driver| driver.devices),
    }
}
