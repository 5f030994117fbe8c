//! The plan: what it predicts is what is taken and executed, and it fits where anything does.

use espalier_kernels::train::Attention;

use super::*;

fn config() -> Config {
    let json = r#"{"model_type": "qwen3", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "rope_theta": 10000, "max_position_embeddings": 1024, "tie_word_embeddings": true}"#;
    Config::parse(json).unwrap()
}

fn large(trained: Trained) -> Settings {
    Settings {
        tokens_max: 512,
        ..settings(trained)
    }
}

/// Bytes that a step takes, those on the host as well.
fn taken(settings: &Settings, keeps: Vec<Keep>) -> (u64, u64, Plan) {
    let config = config();
    let mut trainer = trainer::<f32>(&config, settings, Some(keeps), 1);
    let sample = Sample::new(2, &[300, 212]);
    let supervised = sample.supervised.iter().filter(|target| **target).count();
    let report = trainer.step(&[sample.documents()], 1e-3).unwrap();
    let plan = trainer.plan().clone();
    assert_eq!(report.flops, plan.flops(&sample.ends, supervised as u64));
    let memory = trainer.memory();
    (memory.device_peak, memory.host, plan)
}

#[test]
fn bytes_and_operations_are_those_that_were_predicted() {
    for trained in [lora(8, &Projection::ALL), Trained::Full] {
        for keep in Keep::EVERY {
            let (device, host, plan) = taken(&large(trained.clone()), vec![keep; 4]);
            let apart = device.abs_diff(plan.bytes.device()) as f64 / device as f64;
            assert!(apart < 0.1, "{keep:?}: {device} is not {:?}", plan.bytes);
            assert_eq!(host, plan.bytes.host);
        }
    }
}

#[test]
fn experts_take_the_operations_that_were_predicted() {
    let config = super::config(true, false);
    for keep in Keep::EVERY {
        let settings = settings(lora(4, &Projection::ATTENTION));
        let mut trainer = trainer::<f32>(&config, &settings, Some(vec![keep; 2]), 1);
        let sample = Sample::new(2, &[30, 21]);
        let supervised = sample.supervised.iter().filter(|target| **target).count();
        let report = trainer.step(&[sample.documents()], 1e-3).unwrap();
        let planned = trainer.plan().flops(&sample.ends, supervised as u64);
        assert_eq!(report.flops, planned, "{keep:?}");
    }
}

#[test]
fn attention_by_cudnn_gives_way_before_a_plan_is_refused() {
    let mut settings = large(lora(8, &Projection::ALL));
    settings.precision = Precision::Bf16;
    let best = Attention::LONG_BY_CUDNN;
    let choose = |tokens, budget| Plan::choose_with(&config(), &settings, tokens, budget, best);
    let by_cudnn = choose(2048, None).unwrap();
    assert_eq!(by_cudnn.attention, best);
    let own = Plan::choose_with(&config(), &settings, 2048, None, Attention::Own).unwrap();
    assert_eq!(
        (own.attention, &own.keeps),
        (Attention::Own, &by_cudnn.keeps)
    );
    let room = by_cudnn.bytes.device() - own.bytes.device();
    // A gradient of each score, in bf16.
    let scores = 2 * 2048 * 2048 * config().heads as u64;
    assert!(room > scores && room < scores + scores / 4, "{room}");
    // Layers keep less before the room is given up.
    let (mut budget, mut least) = (by_cudnn.bytes.device(), by_cudnn);
    loop {
        let plan = choose(2048, Some(budget)).unwrap();
        assert!(plan.bytes.device() <= budget);
        match plan.attention {
            Attention::Own => break,
            Attention::Cudnn { .. } => least = plan,
        }
        budget -= 1 << 16;
    }
    assert_eq!(least.keeps, [Keep::Offloaded; 4]);
    // No document is long enough.
    let short = choose(512, None).unwrap();
    let own = Plan::choose_with(&config(), &settings, 512, None, Attention::Own).unwrap();
    assert_eq!(short.bytes, own.bytes);
}

#[test]
fn less_memory_keeps_less_until_nothing_fits() {
    // The host has no memory beside that of the CPU.
    for (precision, least) in [
        (Precision::F32, Keep::Input),
        (Precision::Bf16, Keep::Offloaded),
    ] {
        let settings = Settings {
            precision,
            ..large(lora(8, &Projection::ALL))
        };
        keeps_less_until(&settings, least);
    }
}

fn keeps_less_until(settings: &Settings, leanest: Keep) {
    let config = config();
    let choose = |budget| Plan::choose(&config, settings, 512, budget);
    let most = choose(None).unwrap();
    assert_eq!(most.keeps, [Keep::All; 4]);
    let mut budget = most.bytes.device();
    let mut seen = vec![most.keeps.clone()];
    let error = loop {
        match choose(Some(budget)) {
            Ok(plan) => {
                assert!(plan.bytes.device() <= budget);
                if seen.last() != Some(&plan.keeps) {
                    let before = seen.last().unwrap().iter().zip(&plan.keeps);
                    assert!(before.clone().all(|(before, now)| before <= now));
                    seen.push(plan.keeps);
                }
                budget -= 1 << 14;
            }
            Err(error) => break error,
        }
    };
    // Mixed plans too.
    assert!(seen.len() > 8, "{seen:?}");
    assert_eq!(seen.last().unwrap(), &[leanest; 4]);
    let PlanError::TooLittleMemory { least, fits, .. } = error;
    assert!(least > budget && least <= budget + (1 << 14));
    let fits = fits.unwrap();
    assert!(fits < 512 && Plan::choose(&config, settings, fits, Some(budget)).is_ok());
    assert!(Plan::choose(&config, settings, fits + 1, Some(budget)).is_err());
    let text = choose(Some(budget)).unwrap_err().to_string();
    assert!(
        text.contains(&format!("micro-batches of {fits} tokens would fit")),
        "{text}"
    );
    let none = choose(Some(1000)).unwrap_err().to_string();
    assert!(none.contains("do not fit"), "{none}");
}
