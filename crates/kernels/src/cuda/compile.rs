//! From CUDA C++ to machine code of one architecture, by NVRTC, kept on disk. No GPU is needed.

#![expect(unsafe_code, reason = "NVRTC is a C library")]

use std::ffi::{CString, c_char};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};

use super::error::{CudaError, Tried};
use super::library;

/// A file of kernels with the numbers that are compiled into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Module {
    /// Its file.
    pub file: File,
    /// `HEAD_DIM`, for attention; else 0.
    pub head_dim: u32,
    /// `GROUP`, query heads of a KV head, for attention of single tokens; else 0.
    pub group: u32,
}

/// The files of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each file says what it holds")]
pub enum File {
    Embed,
    Norm,
    Mlp,
    Decode,
    Prefill,
    Moe,
    Lora,
    Sampler,
    Tables,
    TrainRows,
    TrainOptimizer,
    TrainGemm,
    TrainMoe,
    TrainAttention,
}

/// Head dimensions that attention is compiled for; 128 is Qwen3's, the others are those of small models.
pub const HEAD_DIMS: [u32; 4] = [16, 32, 64, 128];
/// Those of training, whose products take 32 elements at a time: smaller heads are filled up.
pub const TRAIN_HEAD_DIMS: [u32; 3] = [32, 64, 128];
/// Query heads of a KV head that attention of single tokens is compiled for.
pub const GROUPS: [u32; 5] = [1, 2, 4, 5, 8];

const COMMON: &str = include_str!("src/common.cu");

impl File {
    const WITHOUT_VARIANTS: [Self; 11] = [
        Self::Embed,
        Self::Norm,
        Self::Mlp,
        Self::Moe,
        Self::Lora,
        Self::Sampler,
        Self::Tables,
        Self::TrainRows,
        Self::TrainOptimizer,
        Self::TrainGemm,
        Self::TrainMoe,
    ];

    fn name_and_text(self) -> (&'static str, &'static str) {
        match self {
            Self::Embed => ("embed.cu", include_str!("src/embed.cu")),
            Self::Norm => ("norm.cu", include_str!("src/norm.cu")),
            Self::Mlp => ("mlp.cu", include_str!("src/mlp.cu")),
            Self::Decode => ("decode.cu", include_str!("src/decode.cu")),
            Self::Prefill => ("prefill.cu", include_str!("src/prefill.cu")),
            Self::Moe => ("moe.cu", include_str!("src/moe.cu")),
            Self::Lora => ("lora.cu", include_str!("src/lora.cu")),
            Self::Sampler => ("sampler.cu", include_str!("src/sampler.cu")),
            Self::Tables => ("tables.cu", include_str!("src/tables.cu")),
            Self::TrainRows => ("train/rows.cu", include_str!("src/train/rows.cu")),
            Self::TrainOptimizer => ("train/optimizer.cu", include_str!("src/train/optimizer.cu")),
            Self::TrainGemm => ("train/gemm.cu", include_str!("src/train/gemm.cu")),
            Self::TrainMoe => ("train/moe.cu", include_str!("src/train/moe.cu")),
            Self::TrainAttention => ("train/attention.cu", include_str!("src/train/attention.cu")),
        }
    }
}

impl Module {
    /// A file that has one form only.
    pub(crate) const fn plain(file: File) -> Self {
        Self {
            file,
            head_dim: 0,
            group: 0,
        }
    }

    /// Attention for heads of so many elements.
    pub(crate) const fn of_heads(file: File, head_dim: u32) -> Self {
        Self {
            file,
            head_dim,
            group: 0,
        }
    }

    /// Every module that any model can ask for.
    pub fn all() -> Vec<Self> {
        let plain = File::WITHOUT_VARIANTS.map(Self::plain);
        let prefill = HEAD_DIMS.map(|head_dim| Self::of_heads(File::Prefill, head_dim));
        let training = TRAIN_HEAD_DIMS.map(|dim| Self::of_heads(File::TrainAttention, dim));
        let decode = HEAD_DIMS.iter().flat_map(|&head_dim| {
            GROUPS.map(|group| Self {
                file: File::Decode,
                head_dim,
                group,
            })
        });
        let attention = prefill.into_iter().chain(training).chain(decode);
        plain.into_iter().chain(attention).collect()
    }

    fn source(self) -> String {
        let (name, text) = self.file.name_and_text();
        format!("#line 1 \"common.cu\"\n{COMMON}\n#line 1 \"{name}\"\n{text}")
    }

    fn options(self, architecture: &str) -> Vec<String> {
        let numbers = [("HEAD_DIM", self.head_dim), ("GROUP", self.group)];
        let defines = numbers
            .iter()
            .filter(|(_, n)| *n > 0)
            .map(|(name, n)| format!("-D{name}={n}"));
        [
            format!("--gpu-architecture={architecture}"),
            "--std=c++17".to_owned(),
        ]
        .into_iter()
        .chain(defines)
        .collect()
    }
}

/// Version of the NVRTC that was found.
///
/// # Errors
/// When there is none.
pub fn nvrtc_version() -> Result<(u32, u32), CudaError> {
    library::need_nvrtc()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there; writes two ints.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }
        .result()
        .tried("tell its version")?;
    Ok((major as u32, minor as u32))
}

/// Compute capabilities, as 10 × major + minor, that the NVRTC found can compile for.
///
/// # Errors
/// When there is no NVRTC.
pub fn nvrtc_architectures() -> Result<Vec<u32>, CudaError> {
    library::need_nvrtc()?;
    let mut count = 0;
    // SAFETY: the library is there; writes one int.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }
        .result()
        .tried("count its architectures")?;
    let mut all = vec![0; count as usize];
    // SAFETY: `all` holds as many ints as the library has just said.
    unsafe { sys::nvrtcGetSupportedArchs(all.as_mut_ptr()) }
        .result()
        .tried("list its architectures")?;
    Ok(all.into_iter().map(|a| a as u32).collect())
}

/// The architecture's name for a compute capability. Since Hopper each generation has instructions of its own, which
/// machine code for it may use.
pub fn architecture((major, minor): (u32, u32)) -> String {
    format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

/// A program that ends with its owner.
struct Program {
    handle: sys::nvrtcProgram,
    // The program may refer to its text for as long as it lives.
    _text: CString,
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: `handle` was made by `create_program` and is destroyed only here. A failure would leak a little memory.
        let _ = unsafe { result::destroy_program(self.handle) };
    }
}

/// Machine code of `module` for `architecture` (such as `sm_90a`).
///
/// # Errors
/// When NVRTC is missing or refuses the source, with its log.
pub fn compile(module: Module, architecture: &str) -> Result<Vec<u8>, CudaError> {
    library::need_nvrtc()?;
    let kernel = || format!("{module:?} for {architecture}");
    let text = CString::new(module.source()).map_err(|e| CudaError::Compile {
        kernel: kernel(),
        log: format!("the source holds a zero byte: {e}"),
    })?;
    let handle = result::create_program(&text, None).tried("take a program")?;
    let program = Program {
        handle,
        _text: text,
    };
    // SAFETY: `program` is alive.
    let compiled =
        unsafe { result::compile_program(program.handle, &module.options(architecture)) };
    if compiled.is_err() {
        // SAFETY: as above.
        let log = unsafe { result::get_program_log(program.handle) }
            .tried("tell why a program does not compile")?;
        let log: Vec<u8> = log
            .iter()
            .map(|c| *c as u8)
            .take_while(|c| *c != 0)
            .collect();
        return Err(CudaError::Compile {
            kernel: kernel(),
            log: String::from_utf8_lossy(&log).trim().to_owned(),
        });
    }
    let mut size = 0;
    // SAFETY: `program` is alive and compiled; writes one size.
    unsafe { sys::nvrtcGetCUBINSize(program.handle, &mut size) }
        .result()
        .tried("tell the size of a cubin")?;
    let mut cubin = vec![0u8; size];
    // SAFETY: `cubin` has the size that the library has just said.
    unsafe { sys::nvrtcGetCUBIN(program.handle, cubin.as_mut_ptr().cast::<c_char>()) }
        .result()
        .tried("give a cubin")?;
    if cubin.is_empty() {
        return Err(CudaError::Compile {
            kernel: kernel(),
            log: "the machine code is empty".to_owned(),
        });
    }
    Ok(cubin)
}

/// Machine code that was compiled before, in a folder. Its files hold all that the code depends on, so that a name that
/// two share costs a compilation and nothing else.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

/// First bytes of each file: what it is, and the version of this form.
const MAGIC: &[u8; 8] = b"ESPCUB01";

impl Cache {
    /// Keeps machine code in `folder`, which is made when it is first written to.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// As [`compile`], from the folder where possible. A folder that cannot be read or written costs time, never the
    /// kernels: the second value then says why.
    ///
    /// # Errors
    /// As [`compile`].
    pub fn compile(
        &self,
        module: Module,
        architecture: &str,
    ) -> Result<(Vec<u8>, Option<io::Error>), CudaError> {
        let (major, minor) = nvrtc_version()?;
        let key = format!(
            "{major}.{minor}\n{}\n{}",
            module.options(architecture).join(" "),
            module.source()
        );
        let path = self.path(&key);
        if let Some(cubin) = std::fs::read(&path)
            .ok()
            .and_then(|bytes| unpack(&bytes, key.as_bytes()))
        {
            return Ok((cubin, None));
        }
        let cubin = compile(module, architecture)?;
        let written = self.write(&path, &pack(&cubin, key.as_bytes()));
        Ok((cubin, written.err()))
    }

    fn path(&self, key: &str) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        self.folder.join(format!("{:016x}.cubin", hasher.finish()))
    }

    /// Written aside and renamed: readers see all of a file or nothing.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let aside = path.with_extension(format!("{}.tmp", std::process::id()));
        let mut file = std::fs::File::create(&aside)?;
        file.write_all(bytes)?;
        std::fs::rename(&aside, path)
    }
}

fn pack(cubin: &[u8], key: &[u8]) -> Vec<u8> {
    let lengths = [key.len() as u64, cubin.len() as u64]
        .map(u64::to_le_bytes)
        .concat();
    [MAGIC.as_slice(), &lengths, key, cubin].concat()
}

/// The code, if the file is whole and of this key.
fn unpack(bytes: &[u8], key: &[u8]) -> Option<Vec<u8>> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (lengths, rest) = rest.split_at_checked(16)?;
    let cubin_bytes = u64::from_le_bytes(lengths[8..].try_into().ok()?);
    let of_key = lengths[..8] == (key.len() as u64).to_le_bytes();
    let cubin = rest.strip_prefix(key)?;
    (of_key && cubin.len() as u64 == cubin_bytes).then(|| cubin.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_files_of_the_same_key_are_used() {
        let whole = pack(b"code", b"key");
        assert_eq!(unpack(&whole, b"key").as_deref(), Some(b"code".as_slice()));
        assert_eq!(unpack(&whole, b"kez"), None);
        assert_eq!(
            unpack(&whole, b"keyc"),
            None,
            "a key that reaches into the code"
        );
        for end in 0..whole.len() {
            assert_eq!(unpack(&whole[..end], b"key"), None, "cut at {end}");
        }
    }

    #[test]
    fn hopper_and_later_have_names_of_their_own() {
        assert_eq!(architecture((8, 9)), "sm_89");
        assert_eq!(architecture((9, 0)), "sm_90a");
        assert_eq!(architecture((10, 0)), "sm_100a");
    }

    #[test]
    fn kernels_need_no_headers() {
        for module in Module::all() {
            assert!(!module.source().contains("#include"), "{module:?}");
        }
    }
}
