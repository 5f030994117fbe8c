//! Launches of a mixture of experts. Who goes where stays on the device: products of all experts are one launch.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use super::super::{BufferId, ExpertRoom, ExpertWeights, Kind, Mat, MoeShape, Routes};
use super::{Cuda, count};
use crate::cuda::compile::{File, Module};
use crate::cuda::device::Arg;
use crate::cuda::error::CudaError;

/// As the kernels have it.
const EXPERTS_MAX: usize = 256;
/// Rows and columns of a tile of a product.
const TILE: [usize; 2] = [32, 64];

/// Addresses of a layer's experts at work.
struct Work {
    /// Slots by expert.
    order: u64,
    /// Where each expert's begin.
    starts: u64,
    weights: u64,
    rows: u64,
    mixed: u64,
    gate_up: u64,
    slots: usize,
    hidden: usize,
}

/// A product of the rows of each expert with its matrix.
struct Grouped {
    x: u64,
    matrices: u64,
    out: u64,
    width: usize,
    depth: usize,
    turned: bool,
}

impl Cuda {
    fn launch_experts(
        &self,
        name: &'static str,
        grid: [usize; 2],
        block: u32,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let grid = (count(grid[0]), count(grid[1]), 1);
        // SAFETY: callers give the kernel's arguments, and the arena has checked where they lie.
        unsafe {
            self.device
                .launch(Module::plain(File::TrainMoe), name, grid, block, args)
        }
    }

    pub(super) fn choose(
        &mut self,
        moe: &MoeShape,
        logits: Mat,
        routes: &Routes,
    ) -> Result<(), CudaError> {
        assert_eq!(logits.cols, moe.experts);
        experts_fit(moe)?;
        let (tokens, slots) = (logits.rows, logits.rows * moe.top_k);
        let places = self.room(4 * slots)?;
        let len = moe.ids_len(tokens);
        let ids = self.arena.first(&self.device, routes.ids, len, Kind::Ids);
        let weights = self
            .arena
            .first(&self.device, routes.weights, slots, Kind::Exact);
        let args = [
            Arg::Address(ids),
            Arg::Address(weights),
            Arg::Address(self.arena.exact(&self.device, logits)),
            Arg::U32(count(tokens)),
            Arg::U32(count(moe.experts)),
            Arg::U32(count(moe.top_k)),
            Arg::U32(count(logits.stride)),
            Arg::U32(u32::from(moe.renormalise)),
        ];
        self.launch_experts("route", [tokens.div_ceil(4), 1], 128, &args)?;
        let order = ids + 4 * slots as u64;
        let args = [
            Arg::Address(order + 4 * slots as u64),
            Arg::Address(order),
            Arg::Address(places),
            Arg::Address(ids),
            Arg::U32(count(slots)),
            Arg::U32(count(moe.experts)),
        ];
        let group = Module::plain(File::Moe);
        // SAFETY: the arguments are the kernel's; ids hold slots twice, then the beginnings, and the room a place of each.
        unsafe {
            self.device
                .launch(group, "moe_group", (1, 1, 1), count(EXPERTS_MAX), &args)
        }
    }

    pub(super) fn choose_grad(
        &self,
        moe: &MoeShape,
        [logits, d_logits]: [Mat; 2],
        routes: &Routes,
        d_weights: BufferId,
    ) -> Result<(), CudaError> {
        assert!(logits.cols == moe.experts && d_logits.cols == moe.experts);
        let (tokens, slots) = (logits.rows, logits.rows * moe.top_k);
        let args = [
            Arg::Address(self.arena.narrow(&self.device, d_logits)),
            Arg::Address(self.arena.exact(&self.device, logits)),
            Arg::Address(self.arena.first(&self.device, routes.ids, slots, Kind::Ids)),
            Arg::Address(
                self.arena
                    .first(&self.device, d_weights, slots, Kind::Exact),
            ),
            Arg::U32(count(tokens)),
            Arg::U32(count(moe.experts)),
            Arg::U32(count(moe.top_k)),
            Arg::U32(count(d_logits.stride)),
            Arg::U32(count(logits.stride)),
            Arg::U32(u32::from(moe.renormalise)),
        ];
        self.launch_experts("route_grad", [tokens.div_ceil(4), 1], 128, &args)
    }

    fn work(
        &self,
        moe: &MoeShape,
        rows: Mat,
        routes: &Routes,
        room: &ExpertRoom,
        gate_up: Mat,
    ) -> Result<Work, CudaError> {
        experts_fit(moe)?;
        for (name, got) in [("hidden", rows.cols), ("width", moe.width)] {
            if !got.is_multiple_of(8) {
                return Err(CudaError::Shape {
                    operation: "experts",
                    name,
                    rule: "must be a multiple of 8".to_owned(),
                    got,
                });
            }
        }
        let (tokens, slots) = (rows.rows, rows.rows * moe.top_k);
        assert!(gate_up.rows == slots && gate_up.cols == 2 * moe.width);
        assert_eq!(gate_up.stride, gate_up.cols, "gate and up lie side by side");
        let first = |id, len, kind| self.arena.first(&self.device, id, len, kind);
        let ids = first(routes.ids, moe.ids_len(tokens), Kind::Ids);
        Ok(Work {
            order: ids + 4 * slots as u64,
            starts: ids + 8 * slots as u64,
            weights: first(routes.weights, slots, Kind::Exact),
            rows: first(room.rows, slots * rows.cols, Kind::Activations),
            mixed: first(room.mixed, slots * moe.width, Kind::Activations),
            gate_up: self.arena.narrow(&self.device, gate_up),
            slots,
            hidden: rows.cols,
        })
    }

    /// Address of rows of tokens, which kernels move 16 bytes at a time.
    fn whole_rows(&self, rows: Mat) -> u64 {
        let address = self.arena.narrow(&self.device, rows);
        let whole = rows.stride.is_multiple_of(8) && address.is_multiple_of(16);
        assert!(whole, "rows of experts begin at whole 16 bytes: {rows:?}");
        address
    }

    /// Rows of tokens, by expert.
    fn by_expert(&self, moe: &MoeShape, work: &Work, from: Mat) -> Result<(), CudaError> {
        let args = [
            Arg::Address(work.rows),
            Arg::Address(self.whole_rows(from)),
            Arg::Address(work.order),
            Arg::U32(count(moe.top_k)),
            Arg::U32(count(from.cols)),
            Arg::U32(count(from.stride)),
        ];
        self.launch_experts("rows_by_expert", [work.slots, 1], 128, &args)
    }

    fn grouped(&self, moe: &MoeShape, work: &Work, product: &Grouped) -> Result<(), CudaError> {
        let args = [
            Arg::Address(product.out),
            Arg::Address(product.x),
            Arg::Address(product.matrices),
            Arg::Address(work.starts),
            Arg::U32(count(moe.experts)),
            Arg::U32(count(product.width)),
            Arg::U32(count(product.depth)),
            Arg::U32(u32::from(product.turned)),
        ];
        let tiles = work.slots.div_ceil(TILE[0]) + moe.experts;
        self.launch_experts(
            "grouped",
            [product.width.div_ceil(TILE[1]), tiles],
            128,
            &args,
        )
    }

    /// Adds rows by expert to those of their tokens, times `weights` where there are any.
    fn add_up(
        &mut self,
        moe: &MoeShape,
        work: &Work,
        weights: u64,
        y: Mat,
    ) -> Result<(), CudaError> {
        let places = self.room(4 * work.slots)?;
        let args = [
            Arg::Address(places),
            Arg::Address(work.order),
            Arg::U32(count(work.slots)),
        ];
        self.launch_experts("places", [work.slots.div_ceil(256), 1], 256, &args)?;
        assert_eq!(y.cols, work.hidden);
        let args = [
            Arg::Address(self.whole_rows(y)),
            Arg::Address(work.rows),
            Arg::Address(weights),
            Arg::Address(places),
            Arg::U32(count(moe.top_k)),
            Arg::U32(count(y.cols)),
            Arg::U32(count(y.stride)),
        ];
        self.launch_experts("add_up", [y.rows, 1], 128, &args)
    }

    #[expect(clippy::too_many_arguments, reason = "one op's operands")]
    pub(super) fn mix(
        &mut self,
        moe: &MoeShape,
        x: Mat,
        routes: &Routes,
        weights: &ExpertWeights,
        room: &ExpertRoom,
        gate_up: Mat,
        y: Option<Mat>,
    ) -> Result<(), CudaError> {
        let work = self.work(moe, x, routes, room, gate_up)?;
        self.by_expert(moe, &work, x)?;
        let gate_up_product = Grouped {
            x: work.rows,
            matrices: self.arena.narrow(&self.device, weights.gate_up),
            out: work.gate_up,
            width: 2 * moe.width,
            depth: work.hidden,
            turned: true,
        };
        self.grouped(moe, &work, &gate_up_product)?;
        let Some(y) = y else { return Ok(()) };
        let mixed = Mat::dense(room.mixed, work.slots, moe.width);
        self.gate("swiglu", gate_up, mixed)?;
        let down = Grouped {
            x: work.mixed,
            matrices: self.arena.narrow(&self.device, weights.down),
            out: work.rows,
            width: work.hidden,
            depth: moe.width,
            turned: true,
        };
        self.grouped(moe, &work, &down)?;
        self.add_up(moe, &work, work.weights, y)
    }

    #[expect(clippy::too_many_arguments, reason = "one op's operands")]
    pub(super) fn mix_grad(
        &mut self,
        moe: &MoeShape,
        routes: &Routes,
        weights: &ExpertWeights,
        room: &ExpertRoom,
        gate_up: Mat,
        [d_y, d_x]: [Mat; 2],
        d_weights: BufferId,
    ) -> Result<(), CudaError> {
        let work = self.work(moe, d_y, routes, room, gate_up)?;
        self.by_expert(moe, &work, d_y)?;
        let down = Grouped {
            x: work.rows,
            matrices: self.arena.narrow(&self.device, weights.down),
            out: work.mixed,
            width: moe.width,
            depth: work.hidden,
            turned: false,
        };
        self.grouped(moe, &work, &down)?;
        let d_weights = self
            .arena
            .first(&self.device, d_weights, work.slots, Kind::Exact);
        let args = [
            Arg::Address(work.gate_up),
            Arg::Address(d_weights),
            Arg::Address(work.mixed),
            Arg::Address(work.weights),
            Arg::Address(work.order),
            Arg::U32(count(work.slots)),
            Arg::U32(count(moe.width)),
        ];
        self.launch_experts("mixed_grad", [work.slots.div_ceil(4), 1], 128, &args)?;
        let gate_up_product = Grouped {
            x: work.gate_up,
            matrices: self.arena.narrow(&self.device, weights.gate_up),
            out: work.rows,
            width: work.hidden,
            depth: 2 * moe.width,
            turned: false,
        };
        self.grouped(moe, &work, &gate_up_product)?;
        self.add_up(moe, &work, 0, d_x)
    }
}

fn experts_fit(moe: &MoeShape) -> Result<(), CudaError> {
    let fits = (1..=EXPERTS_MAX).contains(&moe.experts);
    fits.then_some(()).ok_or_else(|| CudaError::Shape {
        operation: "experts",
        name: "experts",
        rule: format!("must be 1 to {EXPERTS_MAX}"),
        got: moe.experts,
    })
}
