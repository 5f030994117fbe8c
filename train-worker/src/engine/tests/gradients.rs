//! Gradients of whole models against finite differences, in f64.

use super::*;

/// The mean loss, in f64 throughout.
fn loss(trainer: &mut Trainer<Cpu<f64>>, sample: &Sample) -> f64 {
    trainer.evaluate(sample.documents()).unwrap();
    let count = sample.supervised.iter().filter(|target| **target).count();
    let losses = Slice::new(trainer.buffers.losses, 0, count);
    trainer.backend.exact(losses).iter().sum::<f64>() / count as f64
}

/// Every parameter at some places.
fn check(config: &Config, trained: Trained) {
    const STEP: f64 = 1e-5;
    let mut trainer = trainer::<f64>(config, &settings(trained), None, 1);
    let sample = Sample::new(3, &[20, 3, 11]);
    let (_, grads) = gradients(&mut trainer, &[&sample]);
    let values = trainer.model.flat.values;
    for parameter in trainer.layout.parameters.clone() {
        let own = &grads[parameter.start..parameter.start + parameter.len];
        let size = own.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        assert!(size > 1e-6, "{} has no gradient", parameter.name);
        for i in (0..parameter.len).step_by((parameter.len / 3).max(1)) {
            let at = parameter.start + i;
            let was = trainer.backend.exact_mut(values)[at];
            let mut at_offset = |offset: f64| {
                trainer.backend.exact_mut(values)[at] = was + offset;
                loss(&mut trainer, &sample)
            };
            let found = (at_offset(STEP) - at_offset(-STEP)) / (2.0 * STEP);
            trainer.backend.exact_mut(values)[at] = was;
            let apart = (found - own[i]).abs() / size.max(1e-3);
            assert!(
                apart < 1e-6,
                "{} {i}: {found} is not {}",
                parameter.name,
                own[i]
            );
        }
    }
}

#[test]
fn of_an_adapter_of_a_dense_model() {
    check(&config(false, true), lora(3, &Projection::ALL));
}

#[test]
fn of_some_projections() {
    use Projection::{Down, K, Q, Up};
    check(&config(false, false), lora(2, &[Q, K, Up, Down]));
}

#[test]
fn of_an_adapter_of_a_mixture_of_experts() {
    check(&config(true, false), lora(3, &Projection::ALL));
    check(&config(true, true), lora(3, &Projection::ATTENTION));
}

#[test]
fn of_all_weights() {
    check(&config(false, true), Trained::Full);
    check(&config(false, false), Trained::Full);
}
