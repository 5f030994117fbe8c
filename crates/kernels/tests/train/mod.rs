//! What each training op must compute, for whatever device: one body a test. An op runs on the device and, in f64, on the
//! CPU, whose gradients are checked against finite differences; what it leaves must agree.
//!
//! Tolerances are ‖got − exact‖ / ‖exact‖ in units of the device's rounding, times the roundings that an op makes on the
//! way from rounded inputs.

pub mod layers;
mod optimizer;
mod products;

use std::sync::Arc;

use espalier_kernels::cpu::Pool;
use espalier_kernels::train::{Backend, BufferId, Cpu, Kind, Mat, Slice};
use half::bf16;

use crate::ops::Numbers;

/// A device and what it must agree with. Both give the same ids for the same requests.
pub struct Bench {
    got: Box<dyn Backend>,
    exact: Cpu<f64>,
    numbers: Numbers,
    unit: f64,
}

impl Bench {
    /// `unit`: relative error of one rounding of a vector, by its norm, with room for the order of sums.
    pub fn new(got: Box<dyn Backend>, unit: f64) -> Self {
        Self {
            got,
            exact: Cpu::new(Arc::new(Pool::new(2))),
            numbers: Numbers::new(17),
            unit,
        }
    }

    /// Runs an op on both.
    fn run(&mut self, op: impl Fn(&mut dyn Backend)) {
        op(&mut *self.got);
        op(&mut self.exact);
        self.got.check().unwrap();
    }

    fn alloc(&mut self, kind: Kind, len: usize) -> BufferId {
        let id = self.got.alloc(kind, len).unwrap();
        assert_eq!(id, self.exact.alloc(kind, len).unwrap());
        id
    }

    fn write(&mut self, buffer: BufferId, values: &[f32]) {
        self.run(|backend| backend.write(buffer, 0, values));
    }

    /// `len` numbers of deviation `scale`, as the kind can hold them.
    fn numbers(&mut self, kind: Kind, len: usize, scale: f32) -> BufferId {
        let buffer = self.alloc(kind, len);
        let values: Vec<f32> = (0..len).map(|_| self.numbers.normal() * scale).collect();
        let values: Vec<f32> = match kind {
            Kind::Exact => values,
            _ => values.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
        };
        self.write(buffer, &values);
        buffer
    }

    /// A matrix of activations, among others of its buffer: `spare` columns more to each row, its start not the buffer's.
    fn mat(&mut self, rows: usize, cols: usize, spare: usize) -> Mat {
        self.mat_of(Kind::Activations, rows, cols, spare)
    }

    fn mat_of(&mut self, kind: Kind, rows: usize, cols: usize, spare: usize) -> Mat {
        let buffer = self.numbers(kind, rows * (cols + spare), 1.0);
        Mat::dense(buffer, rows, cols + spare).columns(spare / 2, cols)
    }

    fn weights(&mut self, len: usize) -> Slice {
        Slice::new(self.numbers(Kind::Weights, len, 1.0), 0, len)
    }

    fn exact_numbers(&mut self, len: usize) -> Slice {
        Slice::new(self.numbers(Kind::Exact, len, 1.0), 0, len)
    }

    fn ids(&mut self, values: &[u32]) -> BufferId {
        let buffer = self.alloc(Kind::Ids, values.len());
        self.run(|backend| backend.write_ids(buffer, 0, values));
        buffer
    }

    /// All of a buffer of so many numbers is near what it must be, also what the op had no business with.
    fn close(&mut self, what: &str, of: Slice, roundings: f64) {
        let got = self.got.read(of);
        self.got.check().unwrap();
        let exact = self.exact.exact(of);
        assert!(got.iter().all(|x| x.is_finite()), "{what}: not a number");
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut got.iter().zip(exact).map(|(g, e)| f64::from(*g) - e))
            / norm(&mut exact.iter().copied());
        let allowed = self.unit * roundings;
        assert!(
            error <= allowed,
            "{what}: off by {error:.2e}, {allowed:.2e} allowed"
        );
    }

    /// The whole buffer of a matrix.
    fn close_all(&mut self, what: &str, mat: Mat, roundings: f64) {
        let all = Slice::new(mat.buffer, 0, mat.rows * mat.stride);
        self.close(what, all, roundings);
    }

    /// Exact values for what comes next: what the device has computed so far, as it has rounded it.
    fn agree(&mut self, of: Slice) {
        let values = self.got.read(of);
        self.exact.write(of.buffer, of.start, &values);
    }
}

pub type Body = fn(&mut Bench);

pub const TESTS: &[(&str, Body)] = &[
    ("training_products", products::products),
    ("training_rows_by_id", products::rows_by_id),
    ("training_copies", products::copies),
    ("training_offload", products::offload),
    ("training_norms", layers::norms),
    ("training_rotation", layers::rotation),
    ("training_attention", layers::attention),
    ("training_swiglu", layers::swiglu),
    ("training_experts", layers::experts),
    ("training_cross_entropy", layers::cross_entropy),
    ("training_adamw", optimizer::adamw),
    ("training_adamw_in_8_bits", optimizer::adamw8),
    ("training_sums_of_squares", optimizer::sums_of_squares),
];
