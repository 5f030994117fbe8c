//! Low-rank adapters: `y += scale · B · (A · x)` for rows of one adapter.

use super::linear::{PackedLinear, linear};
use super::pool::Pool;

/// The two matrices of an adapted projection.
pub struct LoraPair {
    /// `[r, inputs]`.
    pub a: PackedLinear,
    /// `[outputs, r]`.
    pub b: PackedLinear,
    /// What their product is multiplied with.
    pub scale: f32,
    /// Where its outputs start in a row of `y`: projections of one input are packed side by side.
    pub offset: usize,
}

/// Adds the pair's part to every row: `x` is `[rows, inputs]`, `y` is `[rows, y_width]`.
///
/// # Panics
/// When lengths do not fit.
pub fn lora_add(pool: &Pool, x: &[f32], pair: &LoraPair, y: &mut [f32], y_width: usize) {
    let rows = x.len() / pair.a.inputs();
    let outputs = pair.b.outputs();
    assert!(y.len() == rows * y_width && pair.offset + outputs <= y_width);
    let mut low = vec![0.0; rows * pair.a.outputs()];
    linear(pool, x, &pair.a, &mut low);
    let mut delta = vec![0.0; rows * outputs];
    linear(pool, &low, &pair.b, &mut delta);
    for (y, delta) in y.chunks_mut(y_width).zip(delta.chunks(outputs)) {
        for (y, d) in y[pair.offset..].iter_mut().zip(delta) {
            *y += pair.scale * d;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::numbers;
    use crate::cpu::{Form, RowSource};

    /// Against f64, 1e-5.
    #[test]
    fn the_low_rank_part_is_added_at_its_place() {
        let pool = Pool::new(2);
        let (rows, inputs, r, outputs, width) = (3, 40, 4, 70, 100);
        let (x, a, b) = (
            numbers(1, rows * inputs),
            numbers(2, r * inputs),
            numbers(3, outputs * r),
        );
        let pack =
            |k, w: &[f32]| PackedLinear::pack(&pool, Form::F32, k, &[RowSource::F32(w)]).unwrap();
        let pair = LoraPair {
            a: pack(inputs, &a),
            b: pack(r, &b),
            scale: 0.5,
            offset: 20,
        };
        let mut y = vec![1.0; rows * width];
        lora_add(&pool, &x, &pair, &mut y, width);
        for (at, y) in y.iter().enumerate() {
            let (row, column) = (at / width, at % width);
            let mut exact = 1.0;
            if (20..90).contains(&column) {
                for i in 0..r {
                    let dot: f64 = (0..inputs)
                        .map(|k| f64::from(a[i * inputs + k]) * f64::from(x[row * inputs + k]))
                        .sum();
                    exact += 0.5 * f64::from(b[(column - 20) * r + i]) * dot;
                }
            }
            assert!(
                (f64::from(*y) - exact).abs() < 1e-5,
                "{at}: {y} for {exact}"
            );
        }
    }
}
