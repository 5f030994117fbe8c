//! What must not change a result: the plan, packing, chunks, splits, threads, and an interruption.

use super::*;

fn models() -> [(Config, Trained); 3] {
    [
        (config(false, true), lora(3, &Projection::ALL)),
        (config(true, false), lora(3, &Projection::ATTENTION)),
        (config(false, false), Trained::Full),
    ]
}

#[test]
fn the_plan_changes_no_bit() {
    let sample = Sample::new(5, &[30, 50]);
    for (config, trained) in models() {
        let settings = settings(trained);
        let mut first = None;
        let mut plans: Vec<Vec<Keep>> = Keep::EVERY.iter().map(|keep| vec![*keep; 2]).collect();
        plans.push(vec![Keep::Offloaded, Keep::All]);
        plans.push(vec![Keep::Heads, Keep::NoGateUp]);
        for keeps in plans {
            let mut trainer = trainer::<f32>(&config, &settings, Some(keeps.clone()), 1);
            // Twice, so that what a first pass leaves is seen not to matter.
            gradients(&mut trainer, &[&Sample::new(6, &[90])]);
            let found = gradients(&mut trainer, &[&sample]);
            assert_eq!(
                first.get_or_insert_with(|| found.clone()),
                &found,
                "{keeps:?}"
            );
        }
    }
}

#[test]
fn a_document_does_not_see_its_neighbours() {
    for (config, trained) in models() {
        let mut trainer = trainer::<f32>(&config, &settings(trained), None, 1);
        let sample = Sample::new(8, &[33, 1, 17, 40]);
        let together = trainer.evaluate(sample.documents()).unwrap();
        for (index, loss) in together.iter().enumerate() {
            let alone = sample.alone(index);
            assert_eq!(trainer.evaluate(alone.documents()).unwrap(), [*loss]);
        }
        let mut changed = Sample::new(8, &[33, 1, 17, 40]);
        changed.ids[5] = (changed.ids[5] + 1) % 61;
        changed.ids[40] = (changed.ids[40] + 1) % 61;
        let other = trainer.evaluate(changed.documents()).unwrap();
        assert!(other[0] != together[0] && other[2] != together[2]);
        assert_eq!((other[1], other[3]), (together[1], together[3]));
    }
}

#[test]
fn losses_of_tokens_add_up_to_those_of_their_documents() {
    for (config, trained) in models() {
        let mut trainer = trainer::<f32>(&config, &settings(trained), None, 1);
        let sample = Sample::new(8, &[33, 1, 17, 40]);
        let tokens = trainer.token_losses(sample.documents()).unwrap();
        let documents = trainer.evaluate(sample.documents()).unwrap();
        let mut rest = tokens.as_slice();
        for (index, document) in documents.iter().enumerate() {
            let (own, after) = rest.split_at(document.tokens as usize);
            rest = after;
            let sum: f64 = own.iter().map(|loss| f64::from(*loss)).sum();
            assert_eq!(sum, document.sum);
            // Each is its own token's, whatever else is a target.
            let mut alone = sample.alone(index);
            let Some(last) = alone.supervised.iter().rposition(|target| *target) else {
                continue;
            };
            alone.supervised[..last].fill(false);
            let found = trainer.token_losses(alone.documents()).unwrap();
            assert_eq!(found, own[own.len() - 1..]);
        }
        assert!(rest.is_empty());
    }
}

#[test]
fn chunks_of_the_head_change_no_bit_of_an_adapter() {
    let config = config(false, true);
    let mut trainer = trainer::<f32>(&config, &settings(lora(3, &Projection::ALL)), None, 1);
    let sample = Sample::new(8, &[33, 47]);
    let whole = gradients(&mut trainer, &[&sample]);
    for rows in [1, 7, 50] {
        trainer.buffers.head.rows = rows;
        assert_eq!(gradients(&mut trainer, &[&sample]), whole);
    }
}

#[test]
fn a_split_into_micro_batches_changes_nothing_but_rounding() {
    for (config, trained) in models() {
        let mut trainer = trainer::<f64>(&config, &settings(trained), None, 1);
        let sample = Sample::new(9, &[33, 20, 27]);
        let parts = [0, 1, 2].map(|index| sample.alone(index));
        let whole = gradients(&mut trainer, &[&sample]);
        let split = gradients(&mut trainer, &[&parts[0], &parts[1], &parts[2]]);
        assert!((whole.0 - split.0).abs() < 1e-6);
        let size = whole.1.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        for (a, b) in whole.1.iter().zip(&split.1) {
            assert!((a - b).abs() < 1e-12 * size.max(1.0), "{a} {b}");
        }
    }
}

fn train(trainer: &mut Trainer<Cpu<f32>>, steps: std::ops::Range<u32>) -> Vec<StepReport> {
    steps
        .map(|step| {
            let (one, two) = (Sample::new(step, &[30, 20]), Sample::new(step + 100, &[41]));
            let micros = [one.documents(), two.documents()];
            trainer.step(&micros, 1e-2).unwrap()
        })
        .collect()
}

#[test]
fn threads_change_no_bit() {
    for (config, trained) in models() {
        let [mut one, mut three] = [1, 3]
            .map(|threads| trainer::<f32>(&config, &settings(trained.clone()), None, threads));
        assert_eq!(train(&mut one, 0..3), train(&mut three, 0..3));
        assert_eq!(one.state(), three.state());
    }
}

#[test]
fn a_state_goes_on_as_if_nothing_had_happened() {
    for bits in [Bits::Fp32, Bits::Eight] {
        for (config, trained) in models() {
            let mut settings = settings(trained);
            settings.optimizer.bits = bits;
            let mut whole = trainer::<f32>(&config, &settings, None, 1);
            train(&mut whole, 0..3);
            let state = whole.state();
            let mut resumed = trainer::<f32>(&config, &settings, None, 1);
            resumed.restore(state.clone()).unwrap();
            assert_eq!(resumed.state(), state);
            assert_eq!(train(&mut whole, 3..6), train(&mut resumed, 3..6));
            assert_eq!(whole.state(), resumed.state());
            assert_eq!(whole.export(), resumed.export());
        }
    }
}

#[test]
fn moments_in_8_bits_train_as_those_in_full_nearly_do() {
    let json = r#"{"model_type": "qwen3", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "rope_theta": 10000, "max_position_embeddings": 256, "tie_word_embeddings": true}"#;
    let config = Config::parse(json).unwrap();
    let sample = Sample::new(1, &[48, 40]);
    let [full, eight] = [Bits::Fp32, Bits::Eight].map(|bits| {
        let mut settings = settings(Trained::Full);
        settings.optimizer.bits = bits;
        let mut trainer = trainer::<f32>(&config, &settings, None, 1);
        let mut small = |name: &str| {
            trainer
                .state()
                .tensors
                .iter()
                .any(|tensor| tensor.name == name)
        };
        // Norms are kept in full, and so is all when 8 bits are not asked for.
        assert!(small("model.norm.weight.m"));
        let codes = "model.layers.0.mlp.gate_proj.weight.m.codes";
        assert_eq!(small(codes), bits == Bits::Eight);
        let losses = (0..30).map(|_| trainer.step(&[sample.documents()], 2e-3).unwrap().loss);
        losses.collect::<Vec<_>>()
    });
    assert!(full[29] < 0.5 * full[0], "{full:?}");
    let apart = full
        .iter()
        .zip(&eight)
        .map(|(a, b)| (a - b).abs())
        .sum::<f64>()
        / 30.0;
    assert!(apart > 0.0 && apart < 0.05 * full[0], "{full:?} {eight:?}");
}
