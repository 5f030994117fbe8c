//! Matrix products by cuBLASLt: bf16 in, fp32 sums, bf16 or fp32 out. The algorithm is chosen once a shape, and the scratch
//! memory is this device's own, so products can be recorded in graphs.

#![expect(
    unsafe_code,
    reason = "cuBLASLt's objects are made, used and destroyed by handle"
)]

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};
use half::bf16;

use super::buffer::Buffer;
use super::device::Device;
use super::error::{CudaError, Tried};
use super::library;
use super::ops::need;

/// Where a product goes.
pub enum Out<'a> {
    /// Rounded once.
    Bf16(&'a mut Buffer<bf16>),
    /// As summed: logits, and what a router decides by.
    F32(&'a mut Buffer<f32>),
}

/// `out[rows, width] = x[rows, depth] · weightᵀ`, with `weight[width, depth]` as checkpoints hold it.
pub struct Linear<'a> {
    /// `[rows, depth]`.
    pub x: &'a Buffer<bf16>,
    /// `[width, depth]`.
    pub weight: &'a Buffer<bf16>,
    /// `[rows, width]`.
    pub out: Out<'a>,
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Columns of `out`.
    pub width: usize,
    /// Columns of `x`.
    pub depth: usize,
}

impl Linear<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer is too short, or cuBLASLt refuses the shape. While a graph is recorded also when this shape was not
    /// multiplied before.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        const OPERATION: &str = "linear";
        let Self {
            rows, width, depth, ..
        } = self;
        need(OPERATION, "x", self.x.len(), rows * depth)?;
        need(OPERATION, "weight", self.weight.len(), width * depth)?;
        let (out, held, wide) = match &self.out {
            Out::Bf16(buffer) => (buffer.address(device), buffer.len(), false),
            Out::F32(buffer) => (buffer.address(device), buffer.len(), true),
        };
        need(OPERATION, "out", held, rows * width)?;
        if rows == 0 {
            return Ok(());
        }
        let shape = Shape {
            rows,
            width,
            depth,
            wide,
        };
        let mut linears = device.linears().borrow_mut();
        let linears = linears.as_mut().ok_or(CudaError::Recording {
            tried: "multiply before the device is open",
        })?;
        linears.prepare(device, shape)?;
        let addresses = [self.weight.address(device), self.x.address(device), out];
        linears.run(device, shape, addresses)
    }
}

/// "Transposed" as cuBLAS numbers it; cudarc names it only beside cuBLAS itself, which is not needed here.
const CUBLAS_OP_T: i32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    width: usize,
    depth: usize,
    wide: bool,
}

/// cuBLASLt's handle, its scratch memory, and what was chosen for each shape so far.
pub(super) struct Linears {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
    plans: HashMap<Shape, Plan>,
}

// SAFETY: handles of cuBLASLt may be used by any thread, one at a time; the device that owns this is not `Sync`.
unsafe impl Send for Linears {}

impl Drop for Linears {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made by `open`, destroyed only here; there is no one to tell of a failure.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Linears {
    pub(super) fn open(device: &Device, workspace_bytes: usize) -> Result<Self, CudaError> {
        library::need_cublaslt()?;
        let workspace = device.zeroed(workspace_bytes)?;
        let handle = result::create_handle().tried("start")?;
        Ok(Self {
            handle,
            workspace,
            plans: HashMap::new(),
        })
    }

    fn prepare(&mut self, device: &Device, shape: Shape) -> Result<(), CudaError> {
        if self.plans.contains_key(&shape) {
            return Ok(());
        }
        device.not_recording("choose how to multiply a new shape")?;
        let plan = Plan::choose(self.handle, shape, self.workspace.len())?;
        self.plans.insert(shape, plan);
        Ok(())
    }

    /// `addresses`: weight, x, out.
    fn run(&self, device: &Device, shape: Shape, addresses: [u64; 3]) -> Result<(), CudaError> {
        device.bind()?;
        let plan = &self.plans[&shape];
        let (one, zero) = (1.0f32, 0.0f32);
        let [weight, x, out] = addresses.map(|a| a as *mut c_void);
        let workspace = self.workspace.address(device) as *mut c_void;
        // SAFETY: handle, descriptors and algorithm live and were made for these shapes; the buffers live and are as long
        // as the shapes say; the factors are read before the call returns (they are of the host).
        unsafe {
            result::matmul(
                self.handle,
                plan.product.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                weight,
                plan.weight.0,
                x,
                plan.x.0,
                out,
                plan.out.0,
                out,
                plan.out.0,
                &raw const plan.algorithm,
                workspace,
                self.workspace.len(),
                device.stream().cu_stream().cast(),
            )
        }
        .tried(format!("multiply {shape:?}"))
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `Layout::new`, destroyed only here.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Layout {
    /// cuBLASLt counts by columns: a matrix of ours `[rows, columns]` is its own `columns` by `rows`.
    fn new(kind: sys::cudaDataType, rows: usize, columns: usize) -> Result<Self, CudaError> {
        result::create_matrix_layout(kind, columns as u64, rows as u64, columns as i64)
            .map(Self)
            .tried("describe a matrix")
    }
}

struct Product(sys::cublasLtMatmulDesc_t);

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: made by `Plan::choose`, destroyed only here.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `Plan::choose`, destroyed only here.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// How a shape is multiplied.
struct Plan {
    product: Product,
    weight: Layout,
    x: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn choose(
        handle: sys::cublasLtHandle_t,
        shape: Shape,
        workspace_bytes: usize,
    ) -> Result<Self, CudaError> {
        let (narrow, wide) = (
            sys::cudaDataType::CUDA_R_16BF,
            sys::cudaDataType::CUDA_R_32F,
        );
        let product =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, wide);
        let product = Product(product.tried("describe a product")?);
        // outᵀ = weight · xᵀ by columns: the weight, seen as depth × width, is transposed.
        let transposed = CUBLAS_OP_T;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the descriptor lives, and this attribute is a 32-bit number.
        unsafe {
            result::set_matmul_desc_attribute(
                product.0,
                attribute,
                (&raw const transposed).cast(),
                4,
            )
        }
        .tried("transpose a matrix")?;
        let weight = Layout::new(narrow, shape.width, shape.depth)?;
        let x = Layout::new(narrow, shape.rows, shape.depth)?;
        let out = Layout::new(
            if shape.wide { wide } else { narrow },
            shape.rows,
            shape.width,
        )?;
        let preference = Preference(result::create_matmul_pref().tried("describe a preference")?);
        let attribute =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the preference lives, and this attribute is a 64-bit number.
        unsafe {
            result::set_matmul_pref_attribute(
                preference.0,
                attribute,
                (&raw const workspace_bytes).cast(),
                size_of::<u64>(),
            )
        }
        .tried("limit its scratch memory")?;
        // SAFETY: all descriptors live.
        let chosen = unsafe {
            result::get_matmul_algo_heuristic(
                handle,
                product.0,
                weight.0,
                x.0,
                out.0,
                out.0,
                preference.0,
            )
        }
        .tried(format!("choose how to multiply {shape:?}"))?;
        Ok(Self {
            product,
            weight,
            x,
            out,
            algorithm: chosen.algo,
        })
    }
}
