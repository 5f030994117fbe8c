//! One GPU: its context, its one stream, and the kernels that were loaded for it.
//!
//! Everything on a device happens in the order in which it was asked for, on one stream. A `Device` may move to another
//! thread, but no two use it at once: it is `Send` and not `Sync`.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, LaunchConfig, PushKernelArg, result, sys,
};
use cudarc::nvrtc::Ptx;

use super::compile::{self, Cache, Module};
use super::error::{CudaError, Tried};
use super::library;
use super::linear::Linears;

/// How a device is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// N of `cuda:N`.
    pub ordinal: usize,
    /// Folders to look for NVRTC and cuBLASLt in, where the loader does not find them.
    pub libraries: Vec<PathBuf>,
    /// Folder that keeps compiled kernels from one start to the next.
    pub kernels: Option<PathBuf>,
    /// Scratch memory of matrix products.
    pub workspace_bytes: usize,
}

impl Default for Options {
    /// `cuda:0`, the loader's libraries, nothing kept, and the 32 MiB of scratch that cuBLAS takes on Hopper.
    fn default() -> Self {
        Self {
            ordinal: 0,
            libraries: Vec::new(),
            kernels: None,
            workspace_bytes: 32 << 20,
        }
    }
}

/// Major compute capability of Hopper.
pub(crate) const HOPPER: u32 = 9;

/// What a graph must keep for as long as it may be replayed.
pub(super) type Kept = Arc<dyn Any + Send + Sync>;

/// An open GPU.
pub struct Device {
    // Before the stream and the context, so that it goes first.
    linears: RefCell<Option<Linears>>,
    functions: RefCell<HashMap<(Module, &'static str), CudaFunction>>,
    modules: RefCell<HashMap<Module, Arc<CudaModule>>>,
    /// Something while a graph is recorded.
    recorded: RefCell<Option<Vec<Kept>>>,
    cache: Option<Cache>,
    cache_problem: RefCell<Option<std::io::Error>>,
    architecture: String,
    capability: (u32, u32),
    multiprocessors: u32,
    shared_bytes_max: u32,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

/// One argument of a kernel.
pub(crate) enum Arg {
    Address(u64),
    U64(u64),
    U32(u32),
    F32(f32),
}

impl Device {
    /// Opens a GPU.
    ///
    /// # Errors
    /// When a library is missing, or the device is, or it is too old.
    pub fn open(options: &Options) -> Result<Self, CudaError> {
        library::look_in(&options.libraries);
        library::need_driver()?;
        library::need_nvrtc()?;
        library::need_cublaslt()?;
        let ordinal = options.ordinal;
        let count = CudaContext::device_count().tried("count devices")? as usize;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).tried(format!("open cuda:{ordinal}"))?;
        let (major, minor) = context
            .compute_capability()
            .tried("tell the compute capability")?;
        let (major, minor) = (major as u32, minor as u32);
        check_capability(ordinal, (major, minor))?;
        // SAFETY: all work is on one stream, so its order is the order of calls, and no allocation was made yet.
        unsafe { context.disable_event_tracking() };
        keep_freed_memory(&context)?;
        let stream = context.new_stream().tried("make a stream")?;
        let multiprocessors =
            sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let shared_bytes =
            sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let device = Self {
            linears: RefCell::new(None),
            functions: RefCell::default(),
            modules: RefCell::default(),
            recorded: RefCell::new(None),
            cache: options.kernels.clone().map(Cache::new),
            cache_problem: RefCell::new(None),
            architecture: compile::architecture((major, minor)),
            capability: (major, minor),
            multiprocessors: context
                .attribute(multiprocessors)
                .tried("count multiprocessors")? as u32,
            shared_bytes_max: context
                .attribute(shared_bytes)
                .tried("ask for shared memory")? as u32,
            stream,
            context,
        };
        let linears = Linears::open(&device, options.workspace_bytes)?;
        device.linears.replace(Some(linears));
        Ok(device)
    }

    /// What kernels are compiled for, such as `sm_90a`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    pub(crate) fn is_hopper(&self) -> bool {
        self.capability.0 == HOPPER
    }

    /// How many thread blocks run side by side at least.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Memory that the threads of a block may share, in bytes.
    pub fn shared_bytes_max(&self) -> u32 {
        self.shared_bytes_max
    }

    /// Free and total memory in bytes. What this process has freed and keeps for later counts as free.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        use sys::CUmemPool_attribute_enum::{
            CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
        };
        let (free, total) = self
            .context
            .mem_get_info()
            .tried("tell how much memory is free")?;
        if !self.context.has_async_alloc() {
            return Ok((free, total));
        }
        let pool = pool_of(&self.context)?;
        let read = |attribute| {
            let mut bytes = 0u64;
            // SAFETY: the pool is the device's, and these attributes are 64-bit numbers.
            unsafe {
                result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast::<c_void>())
            }
            .tried("tell how much memory is kept")?;
            Ok(bytes as usize)
        };
        let reserved: usize = read(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = read(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok((free + reserved.saturating_sub(used), total))
    }

    /// Waits for everything that was launched.
    ///
    /// # Errors
    /// When any of it failed: after such an error the device is of no more use to this process.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.not_recording("wait")?;
        self.stream
            .synchronize()
            .tried("finish what was launched")?;
        self.context
            .check_err()
            .tried("give back what is no longer used")
    }

    /// Why compiled kernels are not kept, if they are not.
    pub fn cache_problem(&self) -> Option<String> {
        self.cache_problem
            .borrow()
            .as_ref()
            .map(ToString::to_string)
    }

    /// Makes this device the calling thread's: calls by address need that, and a device may have moved.
    pub(crate) fn bind(&self) -> Result<(), CudaError> {
        self.context
            .bind_to_thread()
            .tried("serve the calling thread")
    }

    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(super) fn linears(&self) -> &RefCell<Option<Linears>> {
        &self.linears
    }

    pub(super) fn recorded(&self) -> &RefCell<Option<Vec<Kept>>> {
        &self.recorded
    }

    /// Lets the graph that is being recorded, if one is, keep something.
    pub(super) fn keep<T: Any + Send + Sync>(&self, what: impl FnOnce() -> Arc<T>) {
        if let Some(kept) = self.recorded.borrow_mut().as_mut() {
            kept.push(what());
        }
    }

    pub(super) fn not_recording(&self, tried: &'static str) -> Result<(), CudaError> {
        self.recorded
            .borrow()
            .is_none()
            .then_some(())
            .ok_or(CudaError::Recording { tried })
    }

    /// Loads a kernel, so that its first launch need not compile it.
    ///
    /// # Errors
    /// When it does not compile or load, or a graph is being recorded that would be the first to use it.
    pub(super) fn function(
        &self,
        module: Module,
        name: &'static str,
    ) -> Result<CudaFunction, CudaError> {
        if let Some(function) = self.functions.borrow().get(&(module, name)) {
            return Ok(function.clone());
        }
        self.not_recording("load a kernel")?;
        let loaded = self.modules.borrow().get(&module).cloned();
        let loaded = match loaded {
            Some(loaded) => loaded,
            None => self.load(module)?,
        };
        let function = loaded
            .load_function(name)
            .tried(format!("find the kernel {name}"))?;
        self.functions
            .borrow_mut()
            .insert((module, name), function.clone());
        Ok(function)
    }

    fn load(&self, module: Module) -> Result<Arc<CudaModule>, CudaError> {
        let cubin = match &self.cache {
            None => compile::compile(module, &self.architecture)?,
            Some(cache) => {
                let (cubin, problem) = cache.compile(module, &self.architecture)?;
                if problem.is_some() {
                    self.cache_problem.replace(problem);
                }
                cubin
            }
        };
        let loaded = self
            .context
            .load_module(Ptx::from_binary(cubin))
            .tried(format!("load {module:?}"))?;
        self.modules.borrow_mut().insert(module, loaded.clone());
        Ok(loaded)
    }

    /// Launches a kernel. A grid without blocks is nothing to do.
    ///
    /// # Safety
    /// `args` must be the parameters of the kernel in number, order and kind, their addresses those of buffers that are
    /// alive and as long as the kernel reads and writes for this grid.
    pub(crate) unsafe fn launch(
        &self,
        module: Module,
        name: &'static str,
        grid: (u32, u32, u32),
        block: u32,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        // SAFETY: passed on.
        unsafe { self.launch_sharing(module, name, grid, block, 0, args) }
    }

    /// The same with so much shared memory that is not declared.
    ///
    /// # Safety
    /// As [`Device::launch`], and the kernel uses no more shared memory than that.
    pub(crate) unsafe fn launch_sharing(
        &self,
        module: Module,
        name: &'static str,
        grid: (u32, u32, u32),
        block: u32,
        shared_bytes: u32,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        let function = self.function(module, name)?;
        self.keep(|| Arc::new(function.clone()));
        if shared_bytes > 0 {
            // Above 48 KiB a kernel must be allowed to.
            let most =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(most, shared_bytes as i32)
                .tried(format!("give {name} {shared_bytes} bytes to share"))?;
        }
        let mut builder = self.stream.launch_builder(&function);
        for arg in args {
            match arg {
                Arg::Address(a) | Arg::U64(a) => builder.arg(a),
                Arg::U32(n) => builder.arg(n),
                Arg::F32(x) => builder.arg(x),
            };
        }
        let shape = LaunchConfig {
            grid_dim: grid,
            block_dim: (block, 1, 1),
            shared_mem_bytes: shared_bytes,
        };
        // SAFETY: the caller's promise.
        unsafe { builder.launch(shape) }.tried(format!("launch {name}"))?;
        Ok(())
    }
}

/// Refuses devices that are older than the kernels.
pub(super) fn check_capability(
    ordinal: usize,
    (major, minor): (u32, u32),
) -> Result<(), CudaError> {
    let too_old = CudaError::TooOld {
        ordinal,
        major,
        minor,
    };
    (major >= 8).then_some(()).ok_or(too_old)
}

fn pool_of(context: &CudaContext) -> Result<sys::CUmemoryPool, CudaError> {
    // SAFETY: the device is open.
    unsafe { result::device::get_mem_pool(context.cu_device()) }.tried("find its memory pool")
}

/// Memory that is freed stays with the process: it is asked for again in the next moment.
fn keep_freed_memory(context: &CudaContext) -> Result<(), CudaError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let pool = pool_of(context)?;
    // SAFETY: the pool is the device's, and this attribute is a 64-bit number.
    unsafe {
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast::<c_void>())
    }
    .tried("keep freed memory")
}
