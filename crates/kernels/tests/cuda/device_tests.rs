//! What only a GPU has: embedding by drawn ids, graphs, copies that overlap, refusals.

use std::time::Instant;

use espalier_kernels::cuda::{
    AddRmsNorm, Buffer, CudaError, Device, Embed, FROM_DRAWN, GatherRows, Linear, NONE, Options,
    Out, Sample, SampleRow, TOP_MAX, report,
};
use half::bf16;

use crate::on_device::open;

pub const TESTS: &[(&str, fn())] = &[
    ("embedding_reads_given_and_drawn_ids", embedding),
    ("graphs_replay_what_the_buffers_hold", graphs),
    (
        "graphs_hold_no_memory_and_no_copies",
        refusals_while_recording,
    ),
    ("graphs_outlive_buffers", graphs_outlive_buffers),
    ("copies_overlap", copies),
    ("uploads_are_waited_for", uploads_are_waited_for),
    ("parts_share_memory", parts),
    ("marks_tell_the_time", marks),
    ("a_device_moves_to_another_thread", another_thread),
    ("bad_shapes_are_refused", bad_shapes),
    ("a_missing_device_is_named", missing_device),
    ("rows_that_are_left_out_draw_nothing", idle_rows),
    ("the_report_names_the_device", the_report),
    ("time_of_a_sampler_step", sampler_time),
];

fn numbers(len: usize, seed: u32) -> Vec<bf16> {
    let number = |i: u32| {
        (i.wrapping_mul(2_654_435_761)
            .wrapping_add(seed.wrapping_mul(40_503))
            >> 16) as f32
            / 65_536.0
            - 0.5
    };
    (0..len as u32).map(|i| bf16::from_f32(number(i))).collect()
}

fn embedding() {
    let device = open();
    let (hidden, vocab) = (72, 10);
    let table = numbers(vocab * hidden, 1);
    let ids = device.copied(&[3, FROM_DRAWN | 1, 10, 0, NONE]).unwrap();
    let drawn = device.copied(&[7, 9, 11]).unwrap();
    let on_device = device.copied(&table).unwrap();
    let mut out = device.copied(&[bf16::NAN; 5 * 72]).unwrap();
    Embed {
        out: &mut out,
        ids: &ids,
        drawn: &drawn,
        table: &on_device,
        tokens: 5,
        hidden,
    }
    .launch(&device)
    .unwrap();
    let row = |id: usize| &table[id * hidden..][..hidden];
    let zeroes = vec![bf16::ZERO; hidden];
    let got = device.read(&out).unwrap();
    for (token, expected) in [row(3), row(9), &zeroes, row(0), &zeroes]
        .into_iter()
        .enumerate()
    {
        assert_eq!(&got[token * hidden..][..hidden], expected, "token {token}");
    }
    let rows = device.copied(&[2, NONE]).unwrap();
    GatherRows {
        out: &mut out,
        rows: &rows,
        table: &on_device,
        count: 2,
        hidden,
    }
    .launch(&device)
    .unwrap();
    assert_eq!(
        device.read(&out).unwrap()[..2 * hidden],
        [row(2), &zeroes].concat()
    );
}

fn graphs() {
    let device = open();
    let (rows, hidden, width) = (4, 256, 512);
    let weight = device.copied(&numbers(hidden, 2)).unwrap();
    let matrix = device.copied(&numbers(width * hidden, 3)).unwrap();
    let mut residual = device.zeroed::<bf16>(rows * hidden).unwrap();
    let mut normed = device.zeroed::<bf16>(rows * hidden).unwrap();
    let mut logits = device.zeroed::<f32>(rows * width).unwrap();
    let graph = device
        .record(|device| {
            let (out, residual, weight) = (&mut normed, &mut residual, &weight);
            AddRmsNorm {
                out,
                residual,
                x: None,
                weight,
                rows,
                hidden,
                eps: 1e-6,
            }
            .launch(device)?;
            Linear {
                x: &normed,
                weight: &matrix,
                out: Out::F32(&mut logits),
                rows,
                width,
                depth: hidden,
            }
            .launch(device)
        })
        .unwrap();
    for seed in 4..7 {
        let x = numbers(rows * hidden, seed);
        device.write(&mut residual, 0, &x).unwrap();
        device.clear(&mut logits, 0, rows * width).unwrap();
        graph.replay().unwrap();
        let replayed = device.read(&logits).unwrap();
        device.clear(&mut logits, 0, rows * width).unwrap();
        AddRmsNorm {
            out: &mut normed,
            residual: &mut residual,
            x: None,
            weight: &weight,
            rows,
            hidden,
            eps: 1e-6,
        }
        .launch(&device)
        .unwrap();
        Linear {
            x: &normed,
            weight: &matrix,
            out: Out::F32(&mut logits),
            rows,
            width,
            depth: hidden,
        }
        .launch(&device)
        .unwrap();
        let eager = device.read(&logits).unwrap();
        assert_eq!(replayed, eager, "replayed and launched one by one");
        assert!(eager.iter().any(|x| x.abs() > 0.1), "nothing was computed");
    }
}

fn refusals_while_recording() {
    let device = open();
    let mut buffer = device.copied(&[1u32, 2, 3]).unwrap();
    let mut warm = false;
    let recorded = device.record(|device| {
        if !std::mem::replace(&mut warm, true) {
            return Ok(());
        }
        let refused = |result: Result<(), CudaError>| {
            assert!(
                matches!(result, Err(CudaError::Recording { .. })),
                "{result:?}"
            )
        };
        refused(device.zeroed::<u32>(4).map(drop));
        refused(device.read(&buffer).map(drop));
        refused(device.write(&mut buffer, 0, &[4]));
        refused(device.synchronize());
        refused(device.record(|_| Ok(())).map(drop));
        device.clear(&mut buffer, 1, 1)
    });
    let graph = recorded.unwrap();
    assert_eq!(
        device.read(&buffer).unwrap(),
        [1, 2, 3],
        "recording does nothing"
    );
    graph.replay().unwrap();
    assert_eq!(device.read(&buffer).unwrap(), [1, 0, 3]);
    // What fails while it is recorded leaves the device as it was.
    let mut runs = 0;
    let failed = device.record(|device| {
        runs += 1;
        if runs == 2 {
            device.zeroed::<u32>(1).map(drop)
        } else {
            Ok(())
        }
    });
    assert!(failed.is_err());
    assert_eq!(device.read(&buffer).unwrap(), [1, 0, 3]);
}

fn graphs_outlive_buffers() {
    let device = open();
    let mut gone = device.copied(&[bf16::ONE; 64]).unwrap();
    let mut out = device.zeroed::<bf16>(64).unwrap();
    let weight = device.copied(&[bf16::ONE; 64]).unwrap();
    let graph = device
        .record(|device| {
            AddRmsNorm {
                out: &mut out,
                residual: &mut gone,
                x: None,
                weight: &weight,
                rows: 1,
                hidden: 64,
                eps: 0.0,
            }
            .launch(device)
        })
        .unwrap();
    drop((gone, weight));
    // What takes the freed memory would change the result.
    let others: Vec<_> = (0..64)
        .map(|_| device.copied(&[bf16::from_f32(-7.0); 64]).unwrap())
        .collect();
    graph.replay().unwrap();
    assert_eq!(device.read(&out).unwrap(), [bf16::ONE; 64]);
    drop((out, others));
    graph.replay().unwrap();
    device.synchronize().unwrap();
}

fn copies() {
    let device = open();
    let mut from = device.pinned::<u32>(1000).unwrap();
    let mut to = device.readback::<u32>(1000).unwrap();
    let mut buffer = device.zeroed::<u32>(1100).unwrap();
    for round in 0..50u32 {
        // Waits for the copy of the round before.
        from.values()
            .unwrap()
            .iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x = round * 1000 + i as u32);
        device.upload(&mut buffer, 100, &from, 900).unwrap();
        let part = buffer.part(100, 800).unwrap();
        device.download(&mut to, &part, 800).unwrap();
        let got = to.wait().unwrap();
        assert_eq!(got.len(), 800);
        assert!(
            got.iter()
                .enumerate()
                .all(|(i, x)| *x == round * 1000 + i as u32),
            "round {round}"
        );
        assert!(to.is_ready().unwrap());
    }
    assert!(device.upload(&mut buffer, 200, &from, 901).is_err());
    assert!(device.upload(&mut buffer, 0, &from, 1001).is_err());
}

/// Memory that an upload reads is not written again before it was read: uploads wait here behind work of milliseconds.
fn uploads_are_waited_for() {
    let device = open();
    let size = 4096;
    let (x, weight) = (
        device.zeroed::<bf16>(size * size).unwrap(),
        device.zeroed::<bf16>(size * size).unwrap(),
    );
    let mut product = device.zeroed::<f32>(size * size).unwrap();
    let mut from = device.pinned::<u32>(1 << 20).unwrap();
    let mut all = device.zeroed::<u32>(8 << 20).unwrap();
    for round in 0..8u32 {
        from.values().unwrap().fill(round);
        for _ in 0..4 {
            Linear {
                x: &x,
                weight: &weight,
                out: Out::F32(&mut product),
                rows: size,
                width: size,
                depth: size,
            }
            .launch(&device)
            .unwrap();
        }
        device
            .upload(&mut all, (round as usize) << 20, &from, 1 << 20)
            .unwrap();
    }
    let all = device.read(&all).unwrap();
    let as_written = |(i, x): (usize, &u32)| *x == (i >> 20) as u32;
    assert!(all.iter().enumerate().all(as_written));
}

fn parts() {
    let device = open();
    let mut words = device.copied(&(0..64).collect::<Vec<u32>>()).unwrap();
    let mut pairs = words.part::<[u32; 2]>(8, 20).unwrap();
    assert_eq!(device.read(&pairs).unwrap()[..2], [[8, 9], [10, 11]]);
    device.write(&mut pairs, 1, &[[70, 71]]).unwrap();
    assert_eq!(device.read(&words).unwrap()[8..13], [8, 9, 70, 71, 12]);
    let inner = pairs.part::<f32>(2, 4).unwrap();
    let inner: Vec<u32> = device
        .read(&inner)
        .unwrap()
        .iter()
        .map(|x| x.to_bits())
        .collect();
    assert_eq!(inner, [12, 13, 14, 15]);
    assert!(words.part::<u32>(2, 1).is_err(), "not at 16 bytes");
    assert!(words.part::<u32>(8, 57).is_err(), "past the end");
    device.clear(&mut words, 0, 64).unwrap();
    assert_eq!(device.read(&pairs).unwrap(), [[0, 0]; 20]);
}

fn marks() {
    let device = open();
    let mut buffer = device.zeroed::<u32>(64 << 20).unwrap();
    let (start, clears) = (device.mark().unwrap(), 8);
    for _ in 0..clears {
        device.clear(&mut buffer, 0, 64 << 20).unwrap();
    }
    let ms = start.ms_until(&device.mark().unwrap()).unwrap();
    // 2 GiB take a quarter of a millisecond at the 8 TB/s that nothing reaches.
    assert!(ms > 0.25 && ms < 1000.0, "{ms}");
}

/// A device that was opened by one thread serves another.
fn another_thread() {
    let device = open();
    let mut buffer = device.copied(&[1u32, 2, 3, 4]).unwrap();
    let read = std::thread::spawn(move || {
        device.write(&mut buffer, 0, &[9]).unwrap();
        device.read(&buffer).unwrap()
    });
    assert_eq!(read.join().unwrap(), [9, 2, 3, 4]);
}

fn bad_shapes() {
    let device = open();
    let mut out = device.zeroed::<bf16>(64).unwrap();
    let weight = device.zeroed::<bf16>(64).unwrap();
    let mut residual = device.zeroed::<bf16>(63).unwrap();
    let refused = AddRmsNorm {
        out: &mut out,
        residual: &mut residual,
        x: None,
        weight: &weight,
        rows: 1,
        hidden: 64,
        eps: 0.0,
    }
    .launch(&device)
    .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "add_rms_norm: `residual` must hold at least 64 values, got 63"
    );
    let refused = AddRmsNorm {
        out: &mut out,
        residual: &mut residual,
        x: None,
        weight: &weight,
        rows: 1,
        hidden: 60,
        eps: 0.0,
    }
    .launch(&device)
    .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "add_rms_norm: `hidden` must be a multiple of 8, not 0, got 60"
    );
    assert!(device.write(&mut residual, 60, &[bf16::ONE; 4]).is_err());
    // No rows are nothing to do.
    AddRmsNorm {
        out: &mut out,
        residual: &mut residual,
        x: None,
        weight: &weight,
        rows: 0,
        hidden: 64,
        eps: 0.0,
    }
    .launch(&device)
    .unwrap();
}

fn missing_device() {
    let options = Options {
        ordinal: 99,
        ..Options::default()
    };
    let refused = Device::open(&options).err().unwrap();
    assert!(
        refused
            .to_string()
            .starts_with("device cuda:99 does not exist"),
        "{refused}"
    );
}

struct Sampler {
    columns: usize,
    logits: Buffer<f32>,
    how: Buffer<SampleRow>,
    ids: Buffer<u32>,
    none: Buffer<u32>,
    pairs: Buffer<[u32; 2]>,
    drawn: Buffer<u32>,
    floats: [Buffer<f32>; 3],
    top_ids: Buffer<u32>,
}

impl Sampler {
    fn new(device: &Device, columns: usize, how: &[SampleRow]) -> Self {
        let logits: Vec<f32> = numbers(how.len() * columns, 9)
            .iter()
            .map(|x| x.to_f32() * 12.0)
            .collect();
        let zeroed = |len| device.zeroed::<f32>(len).unwrap();
        Self {
            columns,
            logits: device.copied(&logits).unwrap(),
            how: device.copied(how).unwrap(),
            ids: device.zeroed(how.len()).unwrap(),
            none: device.zeroed(1).unwrap(),
            pairs: device.zeroed(1).unwrap(),
            drawn: device.zeroed(how.len()).unwrap(),
            floats: [
                zeroed(how.len()),
                zeroed(how.len() * TOP_MAX),
                zeroed(how.len() * columns),
            ],
            top_ids: device.zeroed(how.len() * TOP_MAX).unwrap(),
        }
    }

    fn launch(&mut self, device: &Device) -> Result<(), CudaError> {
        let [logprobs, top_logprobs, work] = &mut self.floats;
        let masks = &self.none;
        Sample {
            rows: self.how.len(),
            ids: &mut self.ids,
            logprobs,
            top_ids: &mut self.top_ids,
            top_logprobs,
            drawn: &mut self.drawn,
            pairs: &self.pairs,
            work,
            logits: &self.logits,
            how: &self.how,
            masks,
            columns: self.columns,
            ids_end: self.columns,
        }
        .launch(device)
    }
}

fn idle_rows() {
    let device = open();
    let mut sampler = Sampler::new(&device, 500, &[SampleRow::GREEDY, SampleRow::IDLE]);
    sampler.launch(&device).unwrap();
    let ids = device.read(&sampler.ids).unwrap();
    assert!(ids[0] < 500 && ids[1] == NONE, "{ids:?}");
}

fn the_report() {
    let report = report::look();
    println!("{report:?}");
    for library in report.libraries() {
        println!("{library:?}");
        assert!(library.version.is_some() && library.path.is_some() && library.missing.is_none());
    }
    assert!(report.usable(0).is_ok());
    let devices = report.driver.unwrap().devices.unwrap();
    assert!(
        devices
            .iter()
            .all(|d| d.capability.0 > 0 && d.memory_bytes > 0 && !d.name.is_empty())
    );
}

/// No rule about time: it prints what a step of the sampler takes at Qwen3's vocabulary.
fn sampler_time() {
    let device = open();
    println!(
        "compiled for {}, {} multiprocessors",
        device.architecture(),
        device.multiprocessors()
    );
    let usual = SampleRow {
        temperature: 0.6,
        top_k: 20,
        top_p: 0.95,
        ..SampleRow::GREEDY
    };
    let plain = SampleRow {
        temperature: 1.0,
        ..SampleRow::GREEDY
    };
    let nucleus = SampleRow {
        temperature: 1.0,
        top_p: 0.95,
        ..SampleRow::GREEDY
    };
    for (name, how) in [
        ("greedy", SampleRow::GREEDY),
        ("T 1", plain),
        ("T 1, top-p", nucleus),
        ("Qwen3's", usual),
    ] {
        for rows in [1, 64] {
            let mut sampler = Sampler::new(&device, 151_936, &vec![how; rows]);
            sampler.launch(&device).unwrap();
            device.synchronize().unwrap();
            let start = Instant::now();
            for _ in 0..20 {
                sampler.launch(&device).unwrap();
            }
            device.synchronize().unwrap();
            println!(
                "sampler, {name}, {rows} rows: {:.0} µs",
                start.elapsed().as_micros() as f64 / 20.0
            );
        }
    }
}
