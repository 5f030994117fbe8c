use half::bf16;

use super::*;
use crate::cpu::Isa;
use crate::cpu::simd::tests::numbers;

/// The weights that a form stands for.
fn values(weights: &PackedLinear) -> Vec<f32> {
    let mut out = vec![0.0; weights.n * weights.k];
    for (row, out) in out.chunks_mut(weights.k).enumerate() {
        weights.row_into(row, out);
    }
    out
}

fn all_isas() -> Vec<Isa> {
    let all = [Isa::Portable, Isa::Avx2, Isa::Avx512];
    all.into_iter().filter(|isa| isa.is_available()).collect()
}

#[test]
fn forms_stand_for_the_weights_given() {
    let pool = Pool::new(2);
    let (n, k) = (70, 75);
    let given = numbers(1, n * k);
    let pack =
        |form| values(&PackedLinear::pack(&pool, form, k, &[RowSource::F32(&given)]).unwrap());
    assert_eq!(pack(Form::F32), given);
    let rounded: Vec<f32> = given.iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
    assert_eq!(pack(Form::Bf16), rounded);
    for (q8, w) in pack(Form::Q8).chunks(k).zip(given.chunks(k)) {
        for (q8, w) in q8.chunks(SCALE_K).zip(w.chunks(SCALE_K)) {
            let most = w.iter().fold(0.0_f32, |m, w| m.max(w.abs()));
            for (q8, w) in q8.iter().zip(w) {
                assert!((q8 - w).abs() <= most / 127.0 * 0.51, "{q8} for {w}");
            }
        }
    }
}

#[test]
fn a_weight_that_is_no_number_is_none_in_any_form() {
    let pool = Pool::new(1);
    let (n, k) = (4, 40);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut given = numbers(1, n * k);
        given[2 * k + 5] = bad;
        for form in [Form::F32, Form::Bf16, Form::Q8] {
            let weights = PackedLinear::pack(&pool, form, k, &[RowSource::F32(&given)]).unwrap();
            let mut y = vec![0.0; n];
            linear(&pool, &vec![1.0; k], &weights, &mut y);
            let finite: Vec<bool> = y.iter().map(|y| y.is_finite()).collect();
            assert_eq!(finite, [true, true, false, true], "{bad} in {form:?}");
        }
    }
}

#[test]
fn parts_lie_one_under_the_other_and_bytes_are_read() {
    let pool = Pool::new(2);
    let k = 40;
    let given = numbers(2, 100 * k);
    let bytes: Vec<u8> = given[..30 * k]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    let halves: Vec<u8> = given[30 * k..60 * k]
        .iter()
        .flat_map(|w| bf16::from_f32(*w).to_le_bytes())
        .collect();
    let parts = [
        RowSource::F32Bytes(&bytes),
        RowSource::Bf16Bytes(&halves),
        RowSource::F32(&given[60 * k..]),
    ];
    let packed = values(&PackedLinear::pack(&pool, Form::F32, k, &parts).unwrap());
    assert_eq!(packed[..30 * k], given[..30 * k]);
    assert_eq!(packed[60 * k..], given[60 * k..]);
    for (got, w) in packed[30 * k..60 * k].iter().zip(&given[30 * k..]) {
        assert_eq!(*got, bf16::from_f32(*w).to_f32());
    }
}

/// Against sums in f64 of the weights that the form stands for: 2e-6 of the sum of absolute products.
#[test]
fn every_form_and_instruction_set_is_close_to_f64() {
    for (rows, n, k) in [(1, 64, 32), (3, 130, 100), (13, 200, 1030), (300, 65, 33)] {
        let x = numbers(3, rows * k);
        let given = numbers(4, n * k);
        for form in [Form::F32, Form::Bf16, Form::Q8] {
            let mut first: Option<Vec<f32>> = None;
            for isa in all_isas() {
                let pool = Pool::with_isa(2, isa);
                let packed = PackedLinear::pack(&pool, form, k, &[RowSource::F32(&given)]).unwrap();
                let w = values(&packed);
                let mut y = vec![f32::NAN; rows * n];
                linear(&pool, &x, &packed, &mut y);
                for (at, y) in y.iter().enumerate() {
                    let pairs = x[at / n * k..][..k].iter().zip(&w[at % n * k..][..k]);
                    let products = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let (sum, size) =
                        products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                    let error = (f64::from(*y) - sum).abs() / size;
                    assert!(
                        error < 2e-6,
                        "{form:?} {isa:?} {rows}x{n}x{k} at {at}: {error}"
                    );
                }
                let same = first.get_or_insert_with(|| y.clone());
                assert_eq!(*same, y, "{form:?} {isa:?}: other bits");
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_with_any_threads() {
    let (rows, n, k) = (257, 150, 600);
    let x = numbers(5, rows * k);
    let given = numbers(6, n * k);
    for form in [Form::F32, Form::Bf16, Form::Q8] {
        let one = Pool::new(1);
        let packed = PackedLinear::pack(&one, form, k, &[RowSource::F32(&given)]).unwrap();
        let mut alone = vec![0.0; rows * n];
        for (x, y) in x.chunks(k).zip(alone.chunks_mut(n)) {
            linear(&one, x, &packed, y);
        }
        for (threads, batch) in [(1, 2), (2, 5), (3, 12), (2, 13), (5, 100), (2, 257)] {
            let pool = Pool::new(threads);
            let mut together = vec![0.0; rows * n];
            for (x, y) in x.chunks(batch * k).zip(together.chunks_mut(batch * n)) {
                linear(&pool, x, &packed, y);
            }
            assert_eq!(alone, together, "{form:?} {threads} {batch}");
        }
    }
}

#[test]
fn groups_have_matrices_of_their_own() {
    let pool = Pool::new(3);
    let (n, k) = (100, 48);
    let x = numbers(7, 40 * k);
    let matrices: Vec<PackedLinear> = (0..3)
        .map(|i| {
            let given = numbers(10 + i, n * k);
            PackedLinear::pack(&pool, Form::Bf16, k, &[RowSource::F32(&given)]).unwrap()
        })
        .collect();
    let ranges = [0..1, 1..20, 25..40];
    let groups: Vec<Group<'_>> = matrices
        .iter()
        .zip(ranges.clone())
        .map(|(weights, rows)| Group { weights, rows })
        .collect();
    let mut y = vec![7.0; 40 * n];
    linear_grouped(&pool, &x, &groups, &mut y);
    for (weights, rows) in matrices.iter().zip(ranges) {
        let mut expected = vec![0.0; rows.len() * n];
        linear(
            &pool,
            &x[rows.start * k..rows.end * k],
            weights,
            &mut expected,
        );
        assert_eq!(y[rows.start * n..rows.end * n], expected);
    }
    assert!(y[20 * n..25 * n].iter().all(|y| *y == 7.0));
}

#[test]
fn numbers_of_every_kind_become_bf16() {
    let values = [1.0_f32, -2.5, 0.099_975_586, 65504.0, 3.140_625];
    let bytes = |convert: &dyn Fn(f32) -> Vec<u8>| {
        values.iter().flat_map(|x| convert(*x)).collect::<Vec<_>>()
    };
    let wide = bytes(&|x| x.to_le_bytes().to_vec());
    let narrow = bytes(&|x| bf16::from_f32(x).to_le_bytes().to_vec());
    let half = bytes(&|x| f16::from_f32(x).to_le_bytes().to_vec());
    let expected: Vec<bf16> = values[1..4].iter().map(|x| bf16::from_f32(*x)).collect();
    for source in [
        RowSource::F32(&values),
        RowSource::F32Bytes(&wide),
        RowSource::Bf16Bytes(&narrow),
        RowSource::F16Bytes(&half),
    ] {
        let mut out = [bf16::ZERO; 3];
        source.bf16_into(1, &mut out);
        assert_eq!(out.as_slice(), expected);
    }
}

/// Forms whose products are of pairs, where the machine has them.
fn pairs() -> Option<Form> {
    Some(Form::bf16()).filter(|form| *form == Form::Bf16Pairs)
}

#[test]
fn products_of_pairs_are_close_to_f64_and_the_same_for_any_rows_and_threads() {
    let Some(form) = pairs() else { return };
    for (rows, n, k) in [(1, 64, 32), (3, 130, 101), (13, 200, 1030), (300, 65, 33)] {
        let x = numbers(3, rows * k);
        let given = numbers(4, n * k);
        let rounded = |x: &f32| f64::from(bf16::from_f32(*x).to_f32());
        let pool = Pool::new(2);
        let packed = PackedLinear::pack(&pool, form, k, &[RowSource::F32(&given)]).unwrap();
        let w = values(&packed);
        assert!(
            w.iter()
                .zip(&given)
                .all(|(w, g)| f64::from(*w) == rounded(g))
        );
        let mut y = vec![f32::NAN; rows * n];
        linear(&pool, &x, &packed, &mut y);
        for (at, y) in y.iter().enumerate() {
            let pairs = x[at / n * k..][..k].iter().zip(&w[at % n * k..][..k]);
            let products: Vec<f64> = pairs.map(|(x, w)| rounded(x) * f64::from(*w)).collect();
            let exact: f64 = products.iter().sum();
            let size: f64 = products.iter().map(|p| p.abs()).sum();
            let error = (f64::from(*y) - exact).abs() / size.max(1e-30);
            assert!(error < 2e-6, "{rows}x{n}x{k} at {at}: {error}");
        }
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            for (row, expected) in x.chunks(k).zip(y.chunks(n)) {
                let mut alone = vec![f32::NAN; n];
                linear(&pool, row, &packed, &mut alone);
                assert_eq!(alone, expected, "{rows}x{n}x{k}, {threads} threads");
            }
        }
    }
}
