//! The optimizer and sums.

use espalier_kernels::train::{AdamStep, BLOCK_8BIT, Kind, Moments8, Slice};

use super::Bench;

fn step(step: u64) -> AdamStep {
    AdamStep {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        step,
        grad_scale: 0.5,
    }
}

pub fn adamw(bench: &mut Bench) {
    let [value, m, v] = [0; 3].map(|_| bench.exact_numbers(5000));
    bench.run(|backend| {
        backend.zero(m);
        backend.zero(v);
    });
    let part = |slice: Slice| Slice::new(slice.buffer, 3, 4990);
    for at in 1..4 {
        let grad = bench.exact_numbers(5000);
        bench.run(|backend| backend.adamw(&step(at), part(value), part(grad), part(m), part(v)));
    }
    for (what, slice) in [("value", value), ("m", m), ("v", v)] {
        bench.close(what, slice, 0.01);
    }
}

pub fn adamw8(bench: &mut Bench) {
    let len = 3 * BLOCK_8BIT + 40;
    let value = bench.exact_numbers(len);
    let [m_max, v_max] = [0; 2].map(|_| bench.exact_numbers(4));
    let [m, v] = [0; 2].map(|_| Slice::new(bench.alloc(Kind::Bytes, len), 0, len));
    // Zero in either map.
    bench.run(|backend| {
        backend.zero(m_max);
        backend.zero(v_max);
        backend.write_bytes(m.buffer, 0, &vec![127; len]);
        backend.write_bytes(v.buffer, 0, &vec![0; len]);
    });
    let moments = Moments8 { m, v, m_max, v_max };
    for at in 1..4 {
        let grad = bench.exact_numbers(len);
        bench.run(|backend| backend.adamw8(&step(at), value, grad, &moments));
        // A number on the border of two codes may be named by either.
        bench.close("value", value, if at == 1 { 0.01 } else { 0.5 });
        bench.close("largest m", m_max, 0.05);
        bench.close("largest v", v_max, 0.05);
        let codes = |bytes: Vec<u8>| bytes.into_iter().map(i32::from).collect::<Vec<_>>();
        for slice in [m, v] {
            let (mut got, mut exact) = (Vec::new(), Vec::new());
            got.extend(codes(bench.got.read_bytes(slice)));
            exact.extend(codes(espalier_kernels::train::Backend::read_bytes(
                &mut bench.exact,
                slice,
            )));
            let apart: Vec<i32> = got.iter().zip(&exact).map(|(g, e)| (g - e).abs()).collect();
            assert!(apart.iter().all(|apart| *apart <= 1), "{apart:?}");
            assert!(apart.iter().sum::<i32>() <= len as i32 / 50, "{apart:?}");
        }
    }
}

pub fn sums_of_squares(bench: &mut Bench) {
    for len in [1, 1000, 1 << 20] {
        let all = bench.exact_numbers(len + 3);
        let part = Slice::new(all.buffer, 1, len);
        let got = bench.got.sum_squares(part);
        let exact: f64 = bench.exact.exact(part).iter().map(|x| x * x).sum();
        assert!((got - exact).abs() <= 1e-5 * exact, "{got} is not {exact}");
        assert_eq!(bench.got.sum_squares(part), got);
    }
}
