//! Bad input: refused with the field, the value and the rule, and nothing is changed.

use espalier_qwen3::Draw;

use super::*;

fn refused(change: impl FnOnce(&mut Settings)) -> String {
    let mut settings = settings(lora(4, &Projection::ALL));
    change(&mut settings);
    let device = Device::Cpu { threads: 1 };
    match Engine::new(config(true, false), &Seeded::any(), &settings, device) {
        Ok(_) => panic!("{settings:?} was taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn settings_name_the_field_the_value_and_the_rule() {
    let texts = [
        (
            refused(|settings| settings.trained = lora(0, &[Projection::Q])),
            "`rank` must be a whole number from 1 to 1024, got 0",
        ),
        (
            refused(|settings| settings.trained = lora(1, &[])),
            "`targets` must name a projection that this model has outside of its experts, got []",
        ),
        (
            refused(|settings| settings.trained = lora(1, &[Projection::Q, Projection::Q])),
            "`targets` must name each projection once, got [q_proj, q_proj]",
        ),
        (
            refused(|settings| settings.tokens_max = 257),
            "`tokens_max` must be from 1 to the model's 256, got 257",
        ),
        (
            refused(|settings| settings.clip_norm = Some(0.0)),
            "`clip_norm` must be a finite number above 0, got 0",
        ),
        (
            refused(|settings| settings.optimizer.beta2 = 1.0),
            "`beta2` must be in [0, 1), got 1",
        ),
        (
            refused(|settings| settings.precision = Precision::Bf16),
            "`precision` must be f32 on the CPU, got bf16",
        ),
        (
            refused(|settings| settings.trained = Trained::Full),
            "`trained` must be an adapter for a mixture of experts: its experts are frozen, got all weights",
        ),
    ];
    for (text, wanted) in texts {
        assert_eq!(text, wanted);
    }
}

#[test]
fn micro_batches_name_the_document() {
    let mut trainer = trainer::<f32>(&config(false, true), &settings(Trained::Full), None, 1);
    let good = Sample::new(1, &[4, 4]);
    let mut refused = |change: fn(&mut Sample)| {
        let mut bad = Sample::new(1, &[4, 4]);
        change(&mut bad);
        let micros = [good.documents(), bad.documents()];
        trainer.step(&micros, 0.1).unwrap_err().to_string()
    };
    assert_eq!(
        refused(|bad| bad.ids[5] = 61),
        "micro-batch 1, document 1: token 1 must be below 61, got 61"
    );
    assert_eq!(
        refused(|bad| bad.supervised[4] = true),
        "micro-batch 1, document 1: its first token has nothing to be predicted from"
    );
    assert_eq!(
        refused(|bad| bad.ends = vec![4, 4, 8]),
        "micro-batch 1: ends must ascend from 1 to 8, got [4, 4, 8]"
    );
    assert_eq!(
        refused(|bad| bad.ids.clear()),
        "micro-batch 1: must have from 1 to 96 tokens, got 0"
    );
    assert_eq!(
        refused(|bad| bad.supervised.truncate(7)),
        "micro-batch 1: must say of each of 8 tokens whether it is a target, got 7"
    );
    let mut nothing = Sample::new(1, &[4]);
    nothing.supervised.fill(false);
    let error = trainer.step(&[nothing.documents()], 0.1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a step must have a supervised token, got 4 tokens without one"
    );
    assert!(trainer.step(&[good.documents()], f64::NAN).is_err());
}

#[test]
fn a_loss_that_is_no_number_changes_nothing() {
    let config = config(false, true);
    // What the last norm gives overflows.
    let source = Seeded(|name: &str, shape: &[usize]| {
        let any = (Seeded::any().0)(name, shape)?;
        Some(match name {
            "model.norm.weight" => Draw {
                offset: 3e38,
                ..any
            },
            _ => any,
        })
    });
    let settings = settings(lora(2, &Projection::ALL));
    let device = Device::Cpu { threads: 1 };
    let mut engine = Engine::new(config, &source, &settings, device).unwrap();
    let before = engine.state();
    let sample = Sample::new(1, &[6, 9]);
    let error = engine.step(&[sample.documents()], 0.1).unwrap_err();
    let EngineError::LossNotFinite {
        micro: 0,
        document: 0,
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!(engine.state(), before);
}

#[test]
fn states_of_others_are_refused_and_nothing_is_changed() {
    let config = config(false, true);
    let mut four = trainer::<f32>(&config, &settings(lora(4, &Projection::ALL)), None, 1);
    let mut two = trainer::<f32>(&config, &settings(lora(2, &Projection::ALL)), None, 1);
    let before = four.state();
    let error = four.restore(two.state()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "state tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: must be f32 [4, 32], got [2, 32]"
    );
    let mut short = four.state();
    short.tensors.pop();
    let error = four.restore(short).unwrap_err();
    assert!(error.to_string().ends_with("is missing"), "{error}");
    let mut renamed = four.state();
    renamed.tensors[1].name = "other".to_owned();
    assert!(four.restore(renamed).is_err());
    assert_eq!(four.state(), before);
}
