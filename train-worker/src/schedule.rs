//! The learning rate of each step.

use espalier_core::spec::{Schedule, TrainSettings};

/// The rate of step `step`, from 0, of `steps`. It grows along a line over the warm-up, so that the first step has 0 only
/// where there is no warm-up to the peak, and then goes as the schedule says. As transformers' `get_scheduler` has it.
pub fn learning_rate(settings: &TrainSettings, step: u64, steps: u64) -> f64 {
    let warmup = settings.warmup_steps;
    if step < warmup {
        return settings.lr * step as f64 / warmup as f64;
    }
    let rest = steps.saturating_sub(warmup).max(1);
    let gone = ((step - warmup) as f64 / rest as f64).min(1.0);
    let share = match settings.schedule {
        Schedule::Constant => 1.0,
        Schedule::Linear => 1.0 - gone,
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * gone).cos()),
    };
    settings.lr * share
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::spec::TrainSettingsDraft;

    fn rates(schedule: &str, warmup_steps: i64) -> Vec<f64> {
        let draft = TrainSettingsDraft {
            schedule: Some(schedule.to_owned()),
            warmup_steps: Some(warmup_steps),
            lr: Some(1.0),
            ..TrainSettingsDraft::default()
        };
        let settings = draft.check().unwrap();
        (0..8)
            .map(|step| learning_rate(&settings, step, 8))
            .collect()
    }

    #[test]
    fn rates_are_those_of_transformers() {
        // `get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=8)`, read after each step.
        let warm = [0.0, 0.25, 0.5, 0.75];
        assert_eq!(rates("constant", 4), [&warm[..], &[1.0; 4]].concat());
        assert_eq!(
            rates("linear", 4),
            [&warm[..], &[1.0, 0.75, 0.5, 0.25]].concat()
        );
        let cosine = rates("cosine", 4);
        for (found, expected) in cosine[4..]
            .iter()
            .zip([1.0, 0.853_553_39, 0.5, 0.146_446_61])
        {
            assert!((found - expected).abs() < 1e-8, "{cosine:?}");
        }
        assert_eq!(rates("linear", 0)[..2], [1.0, 0.875]);
        assert_eq!(rates("linear", 100)[7], 0.07, "all of it is warm-up");
    }
}
