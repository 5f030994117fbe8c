//! Products: by cuBLASLt, and by a kernel of our own where it refuses.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use super::super::{Form, Kind, Mat, Store};
use super::{Cuda, count};
use crate::cuda::compile::{File, Module};
use crate::cuda::device::Arg;
use crate::cuda::error::CudaError;
use crate::cuda::linear::{ALIGNED_BYTES, Factors, Number, Operand, Shape};

/// `to = scale · op(a) · op(b)`, or is added.
pub(super) struct Gemm {
    pub(super) form: Form,
    pub(super) scale: f64,
    pub(super) a: Mat,
    pub(super) b: Mat,
    pub(super) to: Mat,
    pub(super) store: Store,
}

impl Gemm {
    /// Rows and columns of the result, and what is summed over.
    pub(super) fn sizes(&self) -> [usize; 3] {
        let Self { form, a, b, to, .. } = self;
        let (m, k) = match form {
            Form::Tn => (a.cols, a.rows),
            Form::Nn | Form::Nt => (a.rows, a.cols),
        };
        let (n, depth) = match form {
            Form::Nt => (b.rows, b.cols),
            Form::Nn | Form::Tn => (b.cols, b.rows),
        };
        assert!(
            k == depth && to.rows == m && to.cols == n,
            "{form:?}: {a:?} {b:?} {to:?}"
        );
        [m, n, k]
    }
}

/// Bytes of which an address is a multiple, as far as it matters.
fn alignment(address: u64) -> u32 {
    match address {
        0 => ALIGNED_BYTES,
        _ => 1 << address.trailing_zeros().min(ALIGNED_BYTES.trailing_zeros()),
    }
}

impl Cuda {
    pub(super) fn multiply(&mut self, gemm: &Gemm) -> Result<(), CudaError> {
        let [m, n, k] = gemm.sizes();
        if m == 0 || n == 0 {
            return Ok(());
        }
        let operand = |mat: Mat, transposed: bool| {
            let address = self.arena.numbers(&self.device, mat);
            let number = match self.arena.kind(mat.buffer) {
                Kind::Exact => Number::F32,
                _ => Number::Bf16,
            };
            let operand = Operand {
                number,
                stride: mat.stride,
                transposed,
                aligned_bytes: alignment(address),
            };
            (operand, address)
        };
        // By columns the result is transposed, and its factors change places.
        let (first, first_at) = operand(gemm.b, gemm.form == Form::Nt);
        let (second, second_at) = operand(gemm.a, gemm.form == Form::Tn);
        let (out, out_at) = operand(gemm.to, false);
        let shape = Shape {
            first,
            second,
            out,
            width: n,
            rows: m,
            depth: k,
        };
        let one_type = first.number == second.number
            && (first.number == Number::Bf16 || out.number == Number::F32);
        let keep = if gemm.store == Store::Add { 1.0 } else { 0.0 };
        let scale = gemm.scale as f32;
        if k > 0 && one_type && self.device.multiplies(shape) {
            let factors = Factors { scale, keep };
            return self
                .device
                .multiply(shape, factors, [first_at, second_at, out_at]);
        }
        self.multiply_slowly(gemm, &shape, [out_at, second_at, first_at])
    }

    /// `addresses`: to, a, b.
    fn multiply_slowly(
        &self,
        gemm: &Gemm,
        shape: &Shape,
        addresses: [u64; 3],
    ) -> Result<(), CudaError> {
        let along = |mat: Mat, transposed: bool| match transposed {
            true => [1, mat.stride],
            false => [mat.stride, 1],
        };
        let a = along(gemm.a, gemm.form == Form::Tn);
        let b = along(gemm.b, gemm.form == Form::Nt);
        let is_wide = |operand: &Operand| u32::from(operand.number == Number::F32);
        let [m, n, k] = [shape.rows, shape.width, shape.depth];
        let mut args: Vec<Arg> = addresses.map(Arg::Address).into();
        for number in [m, n, k, gemm.to.stride, a[0], a[1], b[0], b[1]] {
            args.push(Arg::U32(count(number)));
        }
        args.extend([
            Arg::U32(is_wide(&shape.out)),
            Arg::U32(is_wide(&shape.second)),
            Arg::U32(is_wide(&shape.first)),
            Arg::U32(u32::from(gemm.store == Store::Add)),
            Arg::F32(gemm.scale as f32),
        ]);
        let grid = (count(n.div_ceil(16)), count(m.div_ceil(16)), 1);
        // SAFETY: the arguments are the kernel's; the operands lie in their buffers, as the arena has checked.
        unsafe {
            self.device
                .launch(Module::plain(File::TrainGemm), "gemm", grid, 256, &args)
        }
    }
}
