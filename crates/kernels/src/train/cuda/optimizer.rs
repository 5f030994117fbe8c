//! Launches of the optimizer, sums of squares and rounding.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use super::super::cpu::optimizer::{Numbers, maps};
use super::super::{AdamStep, BLOCK_8BIT, Kind, Moments8, Slice};
use super::{Cuda, count};
use crate::cuda::compile::{File, Module};
use crate::cuda::device::Arg;
use crate::cuda::error::{CudaError, Tried};

/// Blocks that a sum of squares is made by: as many in every run and on every device.
pub(super) const SQUARE_BLOCKS: usize = 1024;

/// Blocks for so many elements where each thread takes several.
fn blocks(len: usize) -> usize {
    len.div_ceil(256).min(1 << 16)
}

/// Numbers of a step, as kernels take them.
fn step_args(step: &AdamStep) -> [Arg; 9] {
    let n = Numbers::<f32>::new(step);
    [
        n.beta1, n.beta2, n.rest1, n.rest2, n.eps, n.keep, n.rate, n.root, n.scale,
    ]
    .map(Arg::F32)
}

impl Cuda {
    fn launch_optimizer(
        &self,
        name: &'static str,
        blocks: usize,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let module = Module::plain(File::TrainOptimizer);
        // SAFETY: callers give the kernel's arguments, and the arena has checked where they lie.
        unsafe {
            self.device
                .launch(module, name, (count(blocks), 1, 1), 256, args)
        }
    }

    pub(super) fn round_masters(&self, from: Slice, to: Slice) -> Result<(), CudaError> {
        assert_eq!(from.len, to.len);
        let args = [
            Arg::Address(self.arena.slice(&self.device, to, Kind::Weights)),
            Arg::Address(self.arena.slice(&self.device, from, Kind::Exact)),
            Arg::U64(from.len as u64),
        ];
        self.launch_optimizer("round_to", blocks(from.len), &args)
    }

    pub(super) fn squares(&mut self, of: Slice) -> Result<f64, CudaError> {
        let room = self.room(8 * SQUARE_BLOCKS)?;
        let args = [
            Arg::Address(room),
            Arg::Address(self.arena.slice(&self.device, of, Kind::Exact)),
            Arg::U64(of.len as u64),
        ];
        self.launch_optimizer("sum_squares", SQUARE_BLOCKS, &args)?;
        let mut parts = [0.0_f64; SQUARE_BLOCKS];
        self.device.bind()?;
        let stream = self.device.stream().cu_stream();
        // SAFETY: the room holds as many numbers, and the copy has ended before they are read.
        unsafe { cudarc::driver::result::memcpy_dtoh_async(&mut parts, room, stream) }
            .tried("copy to the host")?;
        self.device.synchronize()?;
        Ok(parts.iter().sum())
    }

    pub(super) fn adam(
        &self,
        step: &AdamStep,
        [value, grad, m, v]: [Slice; 4],
    ) -> Result<(), CudaError> {
        assert!(value.len == grad.len && m.len == grad.len && v.len == grad.len);
        let mut args: Vec<Arg> = [value, grad, m, v]
            .map(|slice| Arg::Address(self.arena.slice(&self.device, slice, Kind::Exact)))
            .into();
        args.push(Arg::U64(grad.len as u64));
        args.extend(step_args(step));
        self.launch_optimizer("adamw", blocks(grad.len), &args)
    }

    pub(super) fn adam8(
        &mut self,
        step: &AdamStep,
        value: Slice,
        grad: Slice,
        moments: &Moments8,
    ) -> Result<(), CudaError> {
        let (len, blocks) = (grad.len, grad.len.div_ceil(BLOCK_8BIT));
        assert!(value.len == len && moments.m.len == len && moments.v.len == len);
        assert!(moments.m_max.len == blocks && moments.v_max.len == blocks);
        let map = match &self.maps {
            Some(map) => map.address(&self.device),
            None => {
                let map = self.device.copied(&maps())?;
                self.maps.insert(map).address(&self.device)
            }
        };
        let at = |slice, kind| Arg::Address(self.arena.slice(&self.device, slice, kind));
        let mut args = vec![
            at(value, Kind::Exact),
            at(grad, Kind::Exact),
            at(moments.m, Kind::Bytes),
            at(moments.v, Kind::Bytes),
            at(moments.m_max, Kind::Exact),
            at(moments.v_max, Kind::Exact),
            Arg::Address(map),
            Arg::U64(len as u64),
        ];
        args.extend(step_args(step));
        self.launch_optimizer("adamw8", blocks, &args)
    }
}
