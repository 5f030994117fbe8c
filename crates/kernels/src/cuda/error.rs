//! What can go wrong on the way to a GPU and on it.

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys::cublasStatus_t;
use cudarc::cudnn::result::CudnnError;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;
use cudarc::nvrtc::result::NvrtcError;

/// Why the GPU cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library is missing.
    #[error("`{library}` was not found, {purpose}: {remedy}")]
    Missing {
        /// Name of the library as its file is called.
        library: &'static str,
        /// What it is needed for.
        purpose: &'static str,
        /// What brings it.
        remedy: &'static str,
    },
    /// There is no such device.
    #[error("device cuda:{ordinal} does not exist: the driver shows {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device is older than the kernels.
    #[error(
        "cuda:{ordinal} has compute capability {major}.{minor}: bf16 kernels need 8.0 at least"
    )]
    TooOld {
        /// Its number.
        ordinal: usize,
        /// Its compute capability.
        major: u32,
        /// The part after the dot.
        minor: u32,
    },
    /// A call of the driver failed.
    #[error("the CUDA driver refused to {tried}")]
    Driver {
        /// What was tried.
        tried: String,
        /// Its answer.
        #[source]
        source: DriverError,
    },
    /// cuBLASLt failed.
    #[error("cuBLASLt refused to {tried}")]
    Linear {
        /// What was tried.
        tried: String,
        /// Its answer.
        #[source]
        source: CublasError,
    },
    /// cuDNN is older than what was tried.
    #[error("cuDNN must be of version 9.14 at least, got {major}.{minor}: install a newer one", major = version / 10_000, minor = version / 100 % 100)]
    OldCudnn {
        /// Its version, as it numbers itself.
        version: usize,
    },
    /// cuDNN failed.
    #[error("cuDNN refused to {tried}: {said}")]
    Graph {
        /// What was tried, and with which node.
        tried: String,
        /// What it says of it.
        said: String,
        /// Its answer.
        #[source]
        source: CudnnError,
    },
    /// NVRTC failed.
    #[error("NVRTC refused to {tried}")]
    Compiler {
        /// What was tried.
        tried: String,
        /// Its answer.
        #[source]
        source: NvrtcError,
    },
    /// A kernel does not compile.
    #[error("{kernel} does not compile: {log}")]
    Compile {
        /// File and variant.
        kernel: String,
        /// What the compiler says.
        log: String,
    },
    /// A buffer or a number does not fit the operation.
    #[error("{operation}: `{name}` {rule}, got {got}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// The buffer or number.
        name: &'static str,
        /// What it must be.
        rule: String,
        /// What it is.
        got: usize,
    },
    /// Something was done while a graph is recorded that a graph cannot hold.
    #[error("cannot {tried} while a graph is recorded")]
    Recording {
        /// What was tried.
        tried: &'static str,
    },
}

impl CudaError {
    /// Whether everything that this process tries on the device from now on will fail as well. What is not known to leave
    /// it well counts as such.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Missing { .. }
            | Self::NoDevice { .. }
            | Self::TooOld { .. }
            | Self::OldCudnn { .. }
            | Self::Compiler { .. }
            | Self::Compile { .. }
            | Self::Shape { .. }
            | Self::Recording { .. } => false,
            Self::Driver { source, .. } => !matches!(
                source.0,
                CUresult::CUDA_ERROR_OUT_OF_MEMORY | CUresult::CUDA_ERROR_INVALID_VALUE
            ),
            Self::Linear { source, .. } => !matches!(
                source.0,
                cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED
                    | cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE
                    | cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
            ),
            Self::Graph { .. } => true,
        }
    }
}

/// Names what a call of the driver was to do.
pub(crate) trait Tried<T> {
    fn tried(self, tried: impl Into<String>) -> Result<T, CudaError>;
}

impl<T> Tried<T> for Result<T, DriverError> {
    fn tried(self, tried: impl Into<String>) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver {
            tried: tried.into(),
            source,
        })
    }
}

impl<T> Tried<T> for Result<T, CublasError> {
    fn tried(self, tried: impl Into<String>) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Linear {
            tried: tried.into(),
            source,
        })
    }
}

impl<T> Tried<T> for Result<T, NvrtcError> {
    fn tried(self, tried: impl Into<String>) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Compiler {
            tried: tried.into(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_lost_to_faults_and_not_to_what_was_too_much() {
        let driver = |code| CudaError::Driver {
            tried: "launch `norm`".to_owned(),
            source: DriverError(code),
        };
        let linear = |code| CudaError::Linear {
            tried: "multiply".to_owned(),
            source: CublasError(code),
        };
        let shape = CudaError::Shape {
            operation: "norm",
            name: "x",
            rule: "must have 8 elements".to_owned(),
            got: 7,
        };
        for well in [
            shape,
            driver(CUresult::CUDA_ERROR_OUT_OF_MEMORY),
            linear(cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED),
        ] {
            assert!(!well.is_lasting(), "{well}");
        }
        for lost in [
            driver(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS),
            driver(CUresult::CUDA_ERROR_ECC_UNCORRECTABLE),
            linear(cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED),
        ] {
            assert!(lost.is_lasting(), "{lost}");
        }
    }
}
