//! Products, rows by id, copies.

use espalier_kernels::train::{Form, Kind, Mat, Slice, Store};

use super::Bench;

/// Kinds of a, b and the result.
type Kinds = [Kind; 3];

fn product(bench: &mut Bench, form: Form, kinds: Kinds, [m, n, k]: [usize; 3], spare: usize) {
    let (a, b) = match form {
        Form::Nn => ([m, k], [k, n]),
        Form::Nt => ([m, k], [n, k]),
        Form::Tn => ([k, m], [k, n]),
    };
    let a = bench.mat_of(kinds[0], a[0], a[1], spare);
    let b = bench.mat_of(kinds[1], b[0], b[1], spare);
    let to = bench.mat_of(kinds[2], m, n, spare);
    for store in [Store::Add, Store::Set] {
        bench.run(|backend| backend.gemm(form, 0.5, a, b, to, store));
        let what = format!("{form:?} {kinds:?} {m}x{n}x{k} {spare} {store:?}");
        bench.close_all(&what, to, 1.5);
    }
}

pub fn products(bench: &mut Bench) {
    use Kind::{Activations, Exact, Weights};
    let all = [
        [Activations, Weights, Activations],
        [Activations, Activations, Exact],
        [Exact, Exact, Exact],
        [Exact, Weights, Activations],
    ];
    for form in [Form::Nn, Form::Nt, Form::Tn] {
        for kinds in all {
            for (sizes, spare) in [
                ([128, 192, 64], 0),
                ([130, 72, 40], 16),
                ([33, 13, 50], 0),
                ([16, 6, 7], 5),
                ([1, 1, 3], 2),
            ] {
                product(bench, form, kinds, sizes, spare);
            }
        }
    }
    let before = bench.got.flops();
    product(bench, Form::Nn, all[0], [8, 16, 24], 0);
    assert_eq!(bench.got.flops() - before, 2 * 2 * 8 * 16 * 24);
}

pub fn rows_by_id(bench: &mut Bench) {
    for (cols, spare) in [(64, 0), (72, 16), (21, 3)] {
        let ids: Vec<u32> = (0..700).map(|i| i * i % 31).collect();
        let ids = bench.ids(&ids);
        let table = bench.mat_of(Kind::Weights, 31, cols, 0);
        let out = bench.mat(700, cols, spare);
        bench.run(|backend| backend.embed(ids, table, out));
        bench.close_all("embed", out, 0.0);
        let d_table = bench.mat_of(Kind::Exact, 31, cols, 0);
        bench.run(|backend| backend.embed_grad(ids, out, d_table));
        // Sums of 20 rows: fp32 however the device rounds activations.
        bench.close_all("embed_grad", d_table, 0.01);
        let rows: Vec<u32> = (0..40).map(|i| 7 * i % 61).collect();
        let rows = Slice::new(bench.ids(&rows), 3, 37);
        let picked = bench.mat(37, cols, spare);
        bench.run(|backend| backend.gather(rows, out, picked));
        bench.close_all("gather", picked, 0.0);
        let to = bench.mat(61, cols, spare);
        bench.run(|backend| backend.scatter(rows, picked, to));
        bench.close_all("scatter", to, 0.0);
    }
}

pub fn copies(bench: &mut Bench) {
    for spare in [0, 6] {
        let (from, to) = (bench.mat(20, 30, spare), bench.mat(20, 30, 2 * spare));
        bench.run(|backend| backend.copy(from, to));
        bench.close_all("copy", to, 0.0);
        bench.run(|backend| backend.zero(Slice::new(to.buffer, 5, 90)));
        bench.close_all("zero", to, 0.0);
    }
    let masters = bench.exact_numbers(1000);
    let weights = bench.weights(1000);
    let part = |slice: Slice| Slice::new(slice.buffer, 100, 801);
    bench.run(|backend| backend.round(part(masters), part(weights)));
    bench.close("round", weights, 1.0);
    // As they lie in a file: 1, -2, 0.5.
    let file = [0x80, 0x3f, 0x00, 0xc0, 0x00, 0x3f];
    for numbers in [weights, masters] {
        bench.run(|backend| backend.write_bf16(numbers.buffer, 3, &file));
        bench.close("bf16 of a file", numbers, 1.0);
        let read = bench.got.read(Slice::new(numbers.buffer, 3, 3));
        assert_eq!(read, [1.0, -2.0, 0.5]);
    }
    let bytes = bench.got.alloc(Kind::Bytes, 10).unwrap();
    bench.got.write_bytes(bytes, 2, &[7, 8, 9]);
    let read = bench.got.read_bytes(Slice::new(bytes, 1, 5));
    assert_eq!(read, [0, 7, 8, 9, 0]);
}

pub fn offload(bench: &mut Bench) {
    let len = 1 << 20;
    let before = bench.got.memory();
    let from = bench.numbers(Kind::Activations, len, 1.0);
    let kept = bench.got.read(Slice::new(from, 0, len));
    let other = bench.numbers(Kind::Activations, len, 1.0);
    let (from, other) = (Mat::dense(from, 1, len), Mat::dense(other, 1, len));
    let backend = &mut bench.got;
    let host = backend.alloc_host(Kind::Activations, len).unwrap();
    let bytes = len as u64 * backend.element_bytes(Kind::Activations);
    let memory = backend.memory();
    assert_eq!(memory.device - before.device, 2 * bytes);
    assert_eq!(memory.host - before.host, bytes);
    backend.offload(from.buffer, host);
    backend.offloaded(host);
    // Written at once behind the copy: what was moved away is what was there before.
    backend.copy(other, from);
    backend.prefetch(host, other.buffer);
    backend.prefetched(host);
    backend.copy(other, from);
    assert_eq!(backend.read(Slice::new(from.buffer, 0, len)), kept);
    backend.free(host);
    backend.free(other.buffer);
    assert_eq!(backend.memory().device - before.device, bytes);
    assert_eq!(backend.memory().host, before.host);
    backend.check().unwrap();
}
