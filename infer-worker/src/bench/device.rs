//! What the device reaches by itself: how fast memory is copied, and how fast bf16 matrices are multiplied.

use espalier_kernels::bf16;
use espalier_kernels::cuda::{Buffer, CudaError, Device, GatherRows, Linear, Options, Out};

/// Measured in this run.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes read and written by a copy in a second.
    pub bytes_per_s: f64,
    /// Multiplications and additions of 8192 × 8192 matrices in a second.
    pub flop_per_s: f64,
}

const ROUNDS: usize = 5;

/// The best of a few rounds.
fn best(
    device: &Device,
    mut work: impl FnMut(&Device) -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    work(device)?;
    let mut best_ms = f32::INFINITY;
    for _ in 0..ROUNDS {
        let start = device.mark()?;
        work(device)?;
        best_ms = best_ms.min(start.ms_until(&device.mark()?)?);
    }
    Ok(f64::from(best_ms) / 1e3)
}

pub(super) fn measure(options: &Options) -> Result<Ceilings, CudaError> {
    let device = Device::open(options)?;
    // 2 GiB, far more than any cache.
    let (rows, columns) = (1 << 17, 8192);
    let from: Buffer<bf16> = device.zeroed(rows * columns)?;
    let mut to: Buffer<bf16> = device.zeroed(rows * columns)?;
    let order: Buffer<u32> = device.copied(&(0..rows as u32).collect::<Vec<_>>())?;
    let copy_s = best(&device, |device| {
        GatherRows {
            out: &mut to,
            rows: &order,
            table: &from,
            count: rows,
            hidden: columns,
        }
        .launch(device)
    })?;
    let size = 8192;
    // Products of zeroes draw less power, and so run faster than any model's.
    let numbers: Vec<bf16> = (0..size * size)
        .map(|i: usize| {
            bf16::from_f32((i.wrapping_mul(2_654_435_761) >> 16 & 255) as f32 / 128.0 - 1.0)
        })
        .collect();
    let (x, weight) = (device.copied(&numbers)?, device.copied(&numbers)?);
    let mut product: Buffer<bf16> = device.zeroed(size * size)?;
    let product_s = best(&device, |device| {
        Linear {
            x: &x,
            weight: &weight,
            out: Out::Bf16(&mut product),
            rows: size,
            width: size,
            depth: size,
        }
        .launch(device)
    })?;
    Ok(Ceilings {
        bytes_per_s: (4 * rows * columns) as f64 / copy_s,
        flop_per_s: 2.0 * (size as f64).powi(3) / product_s,
    })
}
