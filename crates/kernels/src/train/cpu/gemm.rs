//! Products of dense matrices: the second operand is packed into panels of 16 columns once, by all threads, and tiles of
//! registers sweep over it. Each element is one chain of fused multiply-adds for every [`DEPTH`] values of k, and the
//! chains are added up in order, so that neither tiles nor threads change a bit.

#![expect(unsafe_code, reason = "tiles read and threads write through pointers")]

use super::super::real::{Real, TILE_COLS, TILE_ROWS_MAX, Tile, isa, tile_rows};
use super::super::{Form, Store};
use crate::cpu::Pool;
use crate::cpu::pool::Parts;
use crate::cpu::simd::{Kernel, Lanes, dispatch};

/// Values of k in one chain: a panel of so many stays in the first cache.
const DEPTH: usize = 256;
/// Rows of a block: what stays in the second cache. A multiple of every tile's rows.
const BLOCK_ROWS: usize = 96;
/// Panels that a thread sweeps before it takes the next rows.
const SLAB_PANELS: usize = 32;
/// Elements of an operand that are packed at a time, at most: what a product takes for itself.
pub const PACKED_MAX: usize = 4 << 20;

/// An operand: element (i, j) is at `i · row + j · col`.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) row: usize,
    pub(crate) col: usize,
}

impl<T> Operand<'_, T> {
    fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row + (cols - 1) * self.col < self.data.len()
    }
}

/// `c [m, n] = scale · a [m, k] · b [k, n]`, or added to it.
pub(crate) struct Product<'a, T> {
    pub(crate) a: Operand<'a, T>,
    pub(crate) b: Operand<'a, T>,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) scale: T,
    pub(crate) store: Store,
}

impl<'a, T> Product<'a, T> {
    /// From stored matrices with their strides.
    pub(crate) fn new(
        form: Form,
        a: (&'a [T], usize),
        b: (&'a [T], usize),
        [m, n, k]: [usize; 3],
        scale: T,
        store: Store,
    ) -> Self {
        let plain = |(data, stride)| Operand {
            data,
            row: stride,
            col: 1,
        };
        let turned = |(data, stride)| Operand {
            data,
            row: 1,
            col: stride,
        };
        let (a, b) = match form {
            Form::Nn => (plain(a), plain(b)),
            Form::Nt => (plain(a), turned(b)),
            Form::Tn => (turned(a), plain(b)),
        };
        Self {
            a,
            b,
            m,
            n,
            k,
            scale,
            store,
        }
    }
}

/// Computes it; rows of `c` lie `stride` apart. `packed` is room that is kept between calls.
///
/// # Panics
/// When operands are too short.
pub(crate) fn gemm<T: Real>(
    pool: &Pool,
    packed: &mut Vec<T>,
    product: &Product<'_, T>,
    c: &mut [T],
    stride: usize,
) {
    let Product { m, n, k, .. } = *product;
    if m == 0 || n == 0 {
        return;
    }
    assert!(product.a.holds(m, k) && product.b.holds(k, n));
    assert!(n <= stride && (m - 1) * stride + n <= c.len());
    if k == 0 {
        if product.store == Store::Set {
            c.chunks_mut(stride)
                .take(m)
                .for_each(|row| row[..n].fill(T::ZERO));
        }
        return;
    }
    let c = Parts::new(c);
    let chunk = (PACKED_MAX / k / TILE_COLS).max(1) * TILE_COLS;
    for first in (0..n).step_by(chunk) {
        let cols = chunk.min(n - first);
        let panels = cols.div_ceil(TILE_COLS);
        let more = (panels * k * TILE_COLS).saturating_sub(packed.len());
        packed.reserve_exact(more);
        packed.resize(packed.len() + more, T::ZERO);
        let to = Parts::new(packed);
        pool.each(panels, &|panel| {
            // SAFETY: each panel is taken once.
            let to = unsafe { to.part(panel * k * TILE_COLS..(panel + 1) * k * TILE_COLS) };
            let from = first + panel * TILE_COLS;
            pack(pool, &product.b, from..n.min(from + TILE_COLS), k, to);
        });
        let slabs = panels.div_ceil(SLAB_PANELS);
        let packed = &packed[..panels * k * TILE_COLS];
        pool.each(m.div_ceil(BLOCK_ROWS) * slabs, &|item| {
            let (block, slab) = (item / slabs, item % slabs);
            dispatch(
                pool.isa(),
                Block {
                    product,
                    packed,
                    rows: block * BLOCK_ROWS..m.min((block + 1) * BLOCK_ROWS),
                    panels: slab * SLAB_PANELS..panels.min((slab + 1) * SLAB_PANELS),
                    first,
                    c: &c,
                    stride,
                },
            );
        });
    }
}

/// Columns of an operand, side by side for each k; missing ones are zeroes.
pub(crate) fn pack<T: Real>(
    pool: &Pool,
    b: &Operand<'_, T>,
    cols: std::ops::Range<usize>,
    depth: usize,
    to: &mut [T],
) {
    let job = Pack {
        b: *b,
        cols,
        depth,
        to,
    };
    dispatch(pool.isa(), job);
}

struct Pack<'a, T> {
    b: Operand<'a, T>,
    cols: std::ops::Range<usize>,
    depth: usize,
    to: &'a mut [T],
}

impl<T: Real> Kernel for Pack<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let (b, count) = (self.b, self.cols.len());
        let (rows, _) = self.to[..self.depth * TILE_COLS].as_chunks_mut::<TILE_COLS>();
        if b.col == 1 {
            for (p, row) in rows.iter_mut().enumerate() {
                let from = p * b.row + self.cols.start;
                match b.data.get(from..from + TILE_COLS) {
                    Some(all) if count == TILE_COLS => row.copy_from_slice(all),
                    _ => {
                        row.fill(T::ZERO);
                        row[..count].copy_from_slice(&b.data[from..from + count]);
                    }
                }
            }
            return;
        }
        if count < TILE_COLS {
            rows.iter_mut().for_each(|row| row.fill(T::ZERO));
        }
        // Eight values of k at a time, so that what is written stays in the first cache.
        for (block, rows) in rows.chunks_mut(8).enumerate() {
            for (c, col) in self.cols.clone().enumerate() {
                let from = col * b.col + block * 8 * b.row;
                if b.row == 1 {
                    for (row, value) in rows.iter_mut().zip(&b.data[from..]) {
                        row[c] = *value;
                    }
                } else {
                    for (p, row) in rows.iter_mut().enumerate() {
                        row[c] = b.data[from + p * b.row];
                    }
                }
            }
        }
    }
}

/// The first operand of a sweep: element (r, p) is at `start + r · row + p · step`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<T> {
    pub(crate) start: *const T,
    pub(crate) row: usize,
    pub(crate) step: usize,
    pub(crate) count: usize,
}

/// The second: packed panels, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Panels<T> {
    pub(crate) start: *const T,
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

/// Gives the sums of each tile to `put(row, column, rows, sums)`.
///
/// # Safety
/// `depth` values of every row and of every panel can be read.
#[inline(always)]
pub(crate) unsafe fn sweep<T: Real, L: Lanes>(
    _: L,
    a: Rows<T>,
    b: Panels<T>,
    depth: usize,
    mut put: impl FnMut(usize, usize, usize, &Tile<T>),
) {
    let height = tile_rows::<L>();
    let mut sums = [[T::ZERO; TILE_COLS]; TILE_ROWS_MAX];
    for panel in 0..b.count {
        for first in (0..a.count).step_by(height) {
            let rows = height.min(a.count - first);
            // SAFETY: rows beyond the last read the last; panels are there by contract.
            unsafe {
                let at = std::array::from_fn(|r| a.start.add((first + r.min(rows - 1)) * a.row));
                let panel = b.start.add(panel * b.stride);
                T::tile(isa::<L>(), &at, a.step, panel, depth, &mut sums);
            }
            put(first, panel * TILE_COLS, rows, &sums);
        }
    }
}

struct Block<'a, T> {
    product: &'a Product<'a, T>,
    packed: &'a [T],
    rows: std::ops::Range<usize>,
    panels: std::ops::Range<usize>,
    /// Column of the first panel of all.
    first: usize,
    c: &'a Parts<'a, T>,
    stride: usize,
}

impl<T: Real> Kernel for Block<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Product { a, n, k, scale, .. } = *self.product;
        let count = self.rows.len();
        let mut turned = Vec::new();
        for begin in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - begin);
            let add = begin > 0 || self.product.store == Store::Add;
            let start = &raw const a.data[self.rows.start * a.row + begin * a.col];
            let mut rows = Rows {
                start,
                row: a.row,
                step: a.col,
                count,
            };
            if a.col != 1 {
                turn(&a, self.rows.clone(), begin..begin + depth, &mut turned);
                rows = Rows {
                    start: turned.as_ptr(),
                    row: 1,
                    step: count,
                    count,
                };
            }
            let at = (self.panels.start * k + begin) * TILE_COLS;
            let panels = Panels {
                start: &raw const self.packed[at],
                stride: k * TILE_COLS,
                count: self.panels.len(),
            };
            let column = self.first + self.panels.start * TILE_COLS;
            // SAFETY: `gemm` has checked that operands hold `k` values of all rows and columns, and packed the panels. The
            // tile is this item's alone.
            unsafe {
                sweep(lanes, rows, panels, depth, |r, c, rows, sums| {
                    let at = (self.rows.start + r) * self.stride + column + c;
                    let to = self.c.start().add(at);
                    let cols = TILE_COLS.min(n - column - c);
                    put(to, self.stride, rows, cols, scale, add, sums);
                });
            }
        }
    }
}

/// Copies rows of an operand that lie side by side: value p of row r goes to `p · rows + r`.
#[inline(always)]
fn turn<T: Real>(
    a: &Operand<'_, T>,
    rows: std::ops::Range<usize>,
    depth: std::ops::Range<usize>,
    to: &mut Vec<T>,
) {
    to.clear();
    for p in depth {
        let from = p * a.col;
        if a.row == 1 {
            to.extend_from_slice(&a.data[from + rows.start..from + rows.end]);
        } else {
            to.extend(rows.clone().map(|r| a.data[from + r * a.row]));
        }
    }
}

/// Writes a tile.
///
/// # Safety
/// `rows` rows of `cols` elements at `to` are the caller's alone.
#[inline(always)]
unsafe fn put<T: Real>(
    to: *mut T,
    stride: usize,
    rows: usize,
    cols: usize,
    scale: T,
    add: bool,
    sums: &Tile<T>,
) {
    for (r, sums) in sums.iter().enumerate().take(rows) {
        // SAFETY: by contract.
        let to = unsafe { std::slice::from_raw_parts_mut(to.add(r * stride), cols) };
        if let Ok(to) = <&mut [T; TILE_COLS]>::try_from(&mut *to) {
            for (to, sum) in to.iter_mut().zip(sums) {
                *to = if add {
                    sum.fma(scale, *to)
                } else {
                    *sum * scale
                };
            }
        } else {
            for (to, sum) in to.iter_mut().zip(sums) {
                *to = if add {
                    sum.fma(scale, *to)
                } else {
                    *sum * scale
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::simd::tests::numbers;

    fn exact(form: Form, a: &[f32], b: &[f32], [m, n, k]: [usize; 3]) -> Vec<f64> {
        let at = |x: &[f32], i: usize| f64::from(x[i]);
        let mut out = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                let sum = (0..k).map(|p| match form {
                    Form::Nn => at(a, i * k + p) * at(b, p * n + j),
                    Form::Nt => at(a, i * k + p) * at(b, j * k + p),
                    Form::Tn => at(a, p * m + i) * at(b, p * n + j),
                });
                out[i * n + j] = sum.sum();
            }
        }
        out
    }

    fn strides(form: Form, [m, n, k]: [usize; 3]) -> (usize, usize) {
        match form {
            Form::Nn => (k, n),
            Form::Nt => (k, k),
            Form::Tn => (m, n),
        }
    }

    #[test]
    fn products_of_every_form_are_those_of_f64_with_any_threads_and_instructions() {
        let shapes = [
            [1, 1, 1],
            [7, 33, 5],
            [97, 40, 300],
            [130, 515, 70],
            [3, 600, 513],
        ];
        for form in [Form::Nn, Form::Nt, Form::Tn] {
            for shape @ [m, n, k] in shapes {
                let (a, b) = (numbers(1, m * k), numbers(2, k * n));
                let (sa, sb) = strides(form, shape);
                let exact = exact(form, &a, &b, shape);
                let mut first: Option<Vec<f32>> = None;
                for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                    for threads in [1, 3] {
                        if !isa.is_available() {
                            continue;
                        }
                        let pool = Pool::with_isa(threads, isa);
                        let mut c = numbers(3, m * n);
                        let was = c.clone();
                        let product =
                            Product::new(form, (&a, sa), (&b, sb), shape, 0.5, Store::Add);
                        gemm(&pool, &mut Vec::new(), &product, &mut c, n);
                        for ((c, was), exact) in c.iter().zip(&was).zip(&exact) {
                            let wanted = f64::from(*was) + 0.5 * exact;
                            assert!(
                                (f64::from(*c) - wanted).abs() < 1e-5 * k as f64,
                                "{form:?} {shape:?}"
                            );
                        }
                        assert_eq!(
                            first.get_or_insert_with(|| c.clone()),
                            &c,
                            "{isa:?} {threads}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_product_without_depth_is_zero_and_sums_of_rows_do_not_depend_on_other_rows() {
        let pool = Pool::new(2);
        let mut c = vec![1.0_f32; 6];
        let none = Product::new(Form::Nn, (&[], 0), (&[], 3), [2, 3, 0], 1.0, Store::Set);
        gemm(&pool, &mut Vec::new(), &none, &mut c, 3);
        assert_eq!(c, [0.0; 6]);
        let (a, b) = (numbers(1, 50 * 300), numbers(2, 300 * 20));
        let run = |rows: usize, from: usize| {
            let mut c = vec![0.0; rows * 20];
            let shape = [rows, 20, 300];
            let product = Product::new(
                Form::Nn,
                (&a[from * 300..], 300),
                (&b, 20),
                shape,
                1.0,
                Store::Set,
            );
            gemm(&pool, &mut Vec::new(), &product, &mut c, 20);
            c
        };
        let all = run(50, 0);
        assert_eq!(run(1, 31), all[31 * 20..32 * 20]);
    }
}
