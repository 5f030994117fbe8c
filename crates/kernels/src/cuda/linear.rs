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
        // outᵀ = weight · xᵀ by columns: the weight, seen as depth × width, is transposed.
        let shape = Shape {
            first: Operand::dense(Number::Bf16, depth).transposed(),
            second: Operand::dense(Number::Bf16, depth),
            out: Operand::dense(if wide { Number::F32 } else { Number::Bf16 }, width),
            width,
            rows,
            depth,
        };
        let addresses = [self.weight.address(device), self.x.address(device), out];
        device.multiply(
            shape,
            Factors {
                scale: 1.0,
                keep: 0.0,
            },
            addresses,
        )
    }
}

impl Device {
    /// Launches a product; `addresses` are those of first, second, out.
    pub(crate) fn multiply(
        &self,
        shape: Shape,
        factors: Factors,
        addresses: [u64; 3],
    ) -> Result<(), CudaError> {
        let mut linears = self.linears().borrow_mut();
        let linears = linears.as_mut().ok_or(CudaError::Recording {
            tried: "multiply before the device is open",
        })?;
        linears.prepare(self, shape)?;
        linears.run(self, shape, factors, addresses)
    }

    /// Whether cuBLASLt can make a product.
    pub(crate) fn multiplies(&self, shape: Shape) -> bool {
        let mut linears = self.linears().borrow_mut();
        let prepared = linears.as_mut().map(|linears| linears.prepare(self, shape));
        matches!(prepared, Some(Ok(())))
    }
}

/// "Transposed" as cuBLAS numbers it; cudarc names it only beside cuBLAS itself, which is not needed here.
const CUBLAS_OP_T: i32 = 1;

/// What an operand's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Number {
    Bf16,
    F32,
}

impl Number {
    fn cuda(self) -> sys::cudaDataType {
        match self {
            Self::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Self::F32 => sys::cudaDataType::CUDA_R_32F,
        }
    }
}

/// A matrix of a product, as cuBLASLt sees it: by columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Operand {
    pub(crate) number: Number,
    /// From one column to the next.
    pub(crate) stride: usize,
    pub(crate) transposed: bool,
    /// Bytes of which its address is a multiple.
    pub(crate) aligned_bytes: u32,
}

/// What cuBLASLt takes for granted.
pub(crate) const ALIGNED_BYTES: u32 = 256;

impl Operand {
    fn dense(number: Number, stride: usize) -> Self {
        Self {
            number,
            stride,
            transposed: false,
            aligned_bytes: ALIGNED_BYTES,
        }
    }

    fn transposed(self) -> Self {
        Self {
            transposed: true,
            ..self
        }
    }

    /// Its layout, where `op` of it is `rows` by `columns`.
    fn layout(&self, rows: usize, columns: usize) -> Result<Layout, CudaError> {
        let (rows, columns) = if self.transposed {
            (columns, rows)
        } else {
            (rows, columns)
        };
        let kind = self.number.cuda();
        result::create_matrix_layout(kind, rows as u64, columns as u64, self.stride as i64)
            .map(Layout)
            .tried("describe a matrix")
    }
}

/// `out [width, rows] = op(first) [width, depth] · op(second) [depth, rows]`, by columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) first: Operand,
    pub(crate) second: Operand,
    pub(crate) out: Operand,
    pub(crate) width: usize,
    pub(crate) rows: usize,
    pub(crate) depth: usize,
}

/// `out = scale · product + keep · out`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors {
    pub(crate) scale: f32,
    pub(crate) keep: f32,
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

    fn run(
        &self,
        device: &Device,
        shape: Shape,
        factors: Factors,
        addresses: [u64; 3],
    ) -> Result<(), CudaError> {
        device.bind()?;
        let plan = &self.plans[&shape];
        let [first, second, out] = addresses.map(|a| a as *mut c_void);
        let workspace = self.workspace.address(device) as *mut c_void;
        // SAFETY: handle, descriptors and algorithm live and were made for these shapes; the buffers live and are as long
        // as the shapes say; the factors are read before the call returns (they are of the host).
        unsafe {
            result::matmul(
                self.handle,
                plan.product.0,
                (&raw const factors.scale).cast(),
                (&raw const factors.keep).cast(),
                first,
                plan.first.0,
                second,
                plan.second.0,
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

impl Product {
    fn new(shape: &Shape) -> Result<Self, CudaError> {
        let wide = sys::cudaDataType::CUDA_R_32F;
        let product =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, wide);
        let product = Self(product.tried("describe a product")?);
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB,
        };
        let transposed = CUBLAS_OP_T;
        for (operand, attribute) in [
            (&shape.first, CUBLASLT_MATMUL_DESC_TRANSA),
            (&shape.second, CUBLASLT_MATMUL_DESC_TRANSB),
        ] {
            if !operand.transposed {
                continue;
            }
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
        }
        Ok(product)
    }
}

impl Preference {
    fn new(shape: &Shape, workspace_bytes: usize) -> Result<Self, CudaError> {
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        };
        let preference = Self(result::create_matmul_pref().tried("describe a preference")?);
        let set = |attribute, value: *const c_void, size: usize| {
            // SAFETY: the preference lives, and `value` points at a number of the attribute's size.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, value, size) }
                .tried("limit how to multiply")
        };
        let limit = workspace_bytes as u64;
        set(
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const limit).cast(),
            size_of::<u64>(),
        )?;
        for (operand, attribute) in [
            (&shape.first, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES),
            (&shape.second, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES),
            (&shape.out, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES),
            (&shape.out, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES),
        ] {
            let bytes = operand.aligned_bytes;
            set(attribute, (&raw const bytes).cast(), size_of::<u32>())?;
        }
        Ok(preference)
    }
}

/// How a shape is multiplied.
struct Plan {
    product: Product,
    first: Layout,
    second: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn choose(
        handle: sys::cublasLtHandle_t,
        shape: Shape,
        workspace_bytes: usize,
    ) -> Result<Self, CudaError> {
        let product = Product::new(&shape)?;
        let first = shape.first.layout(shape.width, shape.depth)?;
        let second = shape.second.layout(shape.depth, shape.rows)?;
        let out = shape.out.layout(shape.width, shape.rows)?;
        let preference = Preference::new(&shape, workspace_bytes)?;
        // SAFETY: all descriptors live.
        let chosen = unsafe {
            result::get_matmul_algo_heuristic(
                handle,
                product.0,
                first.0,
                second.0,
                out.0,
                out.0,
                preference.0,
            )
        }
        .tried(format!("choose how to multiply {shape:?}"))?;
        Ok(Self {
            product,
            first,
            second,
            out,
            algorithm: chosen.algo,
        })
    }
}
