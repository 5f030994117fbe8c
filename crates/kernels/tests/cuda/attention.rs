//! Training's attention by cuDNN: what any device must give, what the own kernel gives where that takes the CPU too long,
//! and how long both take.

use std::time::Instant;

use espalier_kernels::train::{
    Attended, Attention, Backend, BufferId, Cuda, Heads, Kind, Mat, Slice,
};

use crate::on_device::{trainer, training};
use crate::ops::Numbers;
use crate::train::layers;

pub const TESTS: &[(&str, fn())] = &[
    ("training_attention_by_cudnn", || {
        layers::attention(&mut training(ALL))
    }),
    ("cudnn_attends_as_the_own_kernel_does", agreement),
    ("attention_sees_no_other_document", blindness),
    ("time_of_attention", time),
];

/// cuDNN for documents of any length.
const ALL: Attention = Attention::Cudnn { from: 1 };

/// Rows of numbers that are written; the rest repeats them.
const DRAWN: usize = 512;

fn heads(q: usize, kv: usize, dim: usize) -> Heads {
    Heads {
        q,
        kv,
        dim,
        eps: 1e-6,
    }
}

/// What attention reads and writes.
struct Case {
    gpu: Cuda,
    heads: Heads,
    ends: Vec<usize>,
    with: Attended,
    qkv: Mat,
    d_out: Mat,
    d_qkv: Mat,
}

/// What it has written.
struct Got {
    out: Vec<f32>,
    lse: Vec<f32>,
    d_qkv: Vec<f32>,
}

fn drawn(gpu: &mut Cuda, numbers: &mut Numbers, rows: usize, cols: usize) -> Mat {
    let buffer = gpu.alloc(Kind::Activations, rows * cols).unwrap();
    let first = rows.min(DRAWN);
    let values: Vec<f32> = (0..first * cols).map(|_| numbers.normal()).collect();
    gpu.write(buffer, 0, &values);
    let all = Mat::dense(buffer, rows, cols);
    for row in (DRAWN..rows).step_by(DRAWN) {
        let count = DRAWN.min(rows - row);
        gpu.copy(all.slice_rows(0, count), all.slice_rows(row, count));
    }
    all
}

fn zeroes(gpu: &mut Cuda, kind: Kind, len: usize) -> BufferId {
    gpu.alloc(kind, len).unwrap()
}

impl Case {
    fn new(heads: Heads, ends: &[usize]) -> Self {
        let tokens = *ends.last().unwrap();
        let (mut gpu, mut numbers) = (trainer(), Numbers::new(5));
        let qkv = drawn(&mut gpu, &mut numbers, tokens, heads.qkv_width());
        let qk = drawn(&mut gpu, &mut numbers, tokens, heads.qk_width());
        let out = zeroes(&mut gpu, Kind::Activations, tokens * heads.q_width());
        let d_qkv = zeroes(&mut gpu, Kind::Activations, tokens * heads.qkv_width());
        let with = Attended {
            qk,
            v: qkv.columns(heads.qk_width(), heads.kv * heads.dim),
            out: Mat::dense(out, tokens, heads.q_width()),
            lse: zeroes(&mut gpu, Kind::Exact, heads.q * tokens),
        };
        let d_out = drawn(&mut gpu, &mut numbers, tokens, heads.q_width());
        Self {
            gpu,
            heads,
            ends: ends.to_vec(),
            with,
            qkv,
            d_out,
            d_qkv: Mat::dense(d_qkv, tokens, heads.qkv_width()),
        }
    }

    fn forward(&mut self) {
        self.gpu.attention(&self.heads, &self.ends, &self.with);
    }

    fn backward(&mut self) {
        let (d_out, d_qkv) = (self.d_out, self.d_qkv);
        let (heads, with) = (&self.heads, &self.with);
        self.gpu
            .attention_grad(heads, &self.ends, with, d_out, d_qkv);
    }

    /// Both directions, of which `rows` rows from `first` on are read.
    fn run(&mut self, way: Attention, first: usize, rows: usize) -> Got {
        let tokens = self.tokens();
        let runs = self.gpu.attend_by(way, &self.heads, tokens);
        assert_eq!(runs.unwrap(), way);
        self.forward();
        self.backward();
        let of = |mat: Mat| Slice::new(mat.buffer, first * mat.stride, rows * mat.stride);
        let lse = Slice::new(self.with.lse, first, rows);
        let got = Got {
            out: self.gpu.read(of(self.with.out)),
            lse: self.gpu.read(lse),
            d_qkv: self.gpu.read(of(self.d_qkv)),
        };
        self.gpu.check().unwrap();
        assert!(
            self.gpu.cudnn_problem().is_none(),
            "{:?}",
            self.gpu.cudnn_problem()
        );
        got
    }

    fn tokens(&self) -> usize {
        self.with.qk.rows
    }
}

/// ‖a - b‖ / ‖b‖.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    let size: f64 = b.iter().map(|b| square(*b)).sum();
    (difference / size).sqrt()
}

/// Both round the weights of the softmax, their gradients and the results; cuDNN also gradients of each head of q.
fn agree(what: &str, by_cudnn: &Got, own: &Got) {
    let of = |part: fn(&Got) -> &Vec<f32>| apart(part(by_cudnn), part(own));
    let [out, lse, d_qkv] = [of(|got| &got.out), of(|got| &got.lse), of(|got| &got.d_qkv)];
    println!("{what}: out {out:.1e}, lse {lse:.1e}, d_qkv {d_qkv:.1e} apart");
    assert!(out < 6e-3 && lse < 1e-4 && d_qkv < 8e-3, "{what}");
}

fn agreement() {
    let cases = [
        (heads(32, 8, 128), vec![3000]),
        (heads(32, 8, 128), vec![3000, 3001, 3071, 3626, 3700, 3800]),
        // Heads take turns.
        (heads(32, 8, 128), vec![9000]),
        (heads(16, 8, 128), vec![1500, 2900]),
        (heads(8, 2, 64), vec![300, 301, 1024]),
        (heads(4, 4, 32), vec![129]),
        (heads(4, 2, 16), vec![7, 8, 140, 150]),
    ];
    for (heads, ends) in cases {
        let mut case = Case::new(heads, &ends);
        let tokens = case.tokens();
        let by_cudnn = case.run(ALL, 0, tokens);
        let again = case.run(ALL, 0, tokens);
        assert!(again.out == by_cudnn.out && again.lse == by_cudnn.lse);
        assert!(
            again.d_qkv == by_cudnn.d_qkv,
            "{heads:?}: the same bits each time"
        );
        let own = case.run(Attention::Own, 0, tokens);
        agree(&format!("{heads:?}, {ends:?}"), &by_cudnn, &own);
    }
}

/// Numbers of other documents, even if they are none, change no bit.
fn blindness() {
    let ends = [1100, 2300, 3000];
    for way in [Attention::Own, ALL, Attention::LONG_BY_CUDNN] {
        let mut case = Case::new(heads(8, 2, 64), &ends);
        let before = case.run(way, ends[0], ends[1] - ends[0]);
        for mat in [case.qkv, case.with.qk, case.d_out] {
            for (start, end) in [(0, ends[0]), (ends[1], ends[2])] {
                let values = vec![f32::NAN; (end - start) * mat.stride];
                case.gpu.write(mat.buffer, start * mat.stride, &values);
            }
        }
        let after = case.run(way, ends[0], ends[1] - ends[0]);
        assert!(
            after.out == before.out && after.lse == before.lse,
            "{way:?}"
        );
        assert!(after.d_qkv == before.d_qkv, "{way:?}");
        assert!(after.d_qkv.iter().all(|x| x.is_finite()));
    }
}

/// No rule about time: it prints what both take at Qwen3's heads.
fn time() {
    for ends in [
        vec![128; 64],
        vec![512; 16],
        vec![1024; 8],
        vec![2048; 4],
        vec![8192],
        vec![32_768],
    ] {
        let name = format!("{} of {}", ends.len(), ends[0]);
        let ends: Vec<usize> = (1..=ends.len()).map(|i| i * ends[0]).collect();
        let mut case = Case::new(heads(32, 8, 128), &ends);
        let last = case.tokens() - 128;
        let mut got = Vec::new();
        for way in [ALL, Attention::Own] {
            got.push(case.run(way, last, 128));
            let tflops = [Case::forward, Case::backward].map(|launch| case.tflops(launch));
            let [forward, backward] = tflops;
            println!(
                "attention, {name}, by {}: forward {forward:.0}, backward {backward:.0} TFLOP/s",
                way.name()
            );
        }
        agree(&name, &got[0], &got[1]);
    }
}

impl Case {
    fn tflops(&mut self, launch: fn(&mut Self)) -> f64 {
        const TIMES: u64 = 5;
        let sync = |case: &mut Self| case.gpu.read(Slice::new(case.with.lse, 0, 1));
        launch(self);
        sync(self);
        let (start, before) = (Instant::now(), self.gpu.flops());
        for _ in 0..TIMES {
            launch(self);
        }
        sync(self);
        (self.gpu.flops() - before) as f64 / start.elapsed().as_secs_f64() / 1e12
    }
}
