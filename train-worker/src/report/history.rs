//! The steps of a training, one a line: what `metrics.jsonl` holds, and what plots and event files are made of.

use std::io::Write;

use espalier_core::adapter::AdapterKind;
use serde::{Deserialize, Serialize};

use super::tensorboard::EventFile;
use espalier_core::plot::{self, Point};

/// One optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its number, from 1.
    pub step: u64,
    /// Mean loss of its supervised tokens.
    pub loss: f64,
    /// Norm of the gradient before it was clipped.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Of these, those that it was trained to predict.
    pub supervised: u64,
    /// How long it took.
    pub took_ms: u64,
    /// When it ended, seconds since the epoch.
    pub at_s: f64,
    /// Share of the machine's matrix peak.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_share: Option<f64>,
    /// Mean loss of the held-out samples after it, where they were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
}

impl Step {
    /// Tokens that went through the model in a second.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 * 1000.0 / self.took_ms.max(1) as f64
    }
}

/// All steps so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    steps: Vec<Step>,
    /// As they were written first: numbers that are read from text may differ in their last digit.
    lines: Vec<u8>,
}

impl History {
    /// Reads what [`History::to_lines`] wrote: steps `1..=count`.
    pub fn parse(lines: &[u8], count: u64) -> Option<Self> {
        let each = lines.split(|byte| *byte == b'\n');
        let each = each.filter(|line| !line.is_empty());
        let read = each.map(|line| serde_json::from_slice(line).ok());
        let steps: Vec<Step> = read.collect::<Option<_>>()?;
        let in_order = (1..).zip(&steps).all(|(n, step)| step.step == n);
        (in_order && steps.len() as u64 == count).then(|| Self {
            steps,
            lines: lines.to_vec(),
        })
    }

    /// Adds the next step.
    pub fn push(&mut self, step: Step) {
        // Neither writing into memory nor numbers that are checked to be finite can fail.
        let _ = serde_json::to_writer(&mut self.lines, &step);
        let _ = self.lines.write_all(b"\n");
        self.steps.push(step);
    }

    /// The last step.
    pub fn last(&self) -> Option<&Step> {
        self.steps.last()
    }

    /// What the held-out samples said last.
    pub fn last_eval(&self) -> Option<f64> {
        self.steps.iter().rev().find_map(|step| step.eval_loss)
    }

    /// One JSON object a line.
    pub fn to_lines(&self) -> &[u8] {
        &self.lines
    }

    /// As TensorBoard reads them.
    pub fn to_events(&self) -> Vec<u8> {
        let began = self.steps.first().map_or(0.0, |step| step.at_s);
        let mut file = EventFile::new(began);
        for step in &self.steps {
            let mut values = vec![
                ("train/loss", step.loss),
                ("train/grad_norm", step.grad_norm),
                ("train/learning_rate", step.lr),
                ("train/tokens_per_second", step.tokens_per_s()),
            ];
            values.extend(step.peak_share.map(|share| ("train/peak_share", share)));
            values.extend(step.eval_loss.map(|loss| ("eval/loss", loss)));
            file.scalars(step.at_s, step.step, &values);
        }
        file.into_bytes()
    }

    /// As a picture, for an adapter of this name.
    pub fn to_plot(&self, name: &str, kind: AdapterKind) -> String {
        let train: Vec<Point> = self
            .steps
            .iter()
            .map(|step| (step.step, step.loss))
            .collect();
        let eval = |step: &Step| step.eval_loss.map(|loss| (step.step, loss));
        let eval: Vec<Point> = self.steps.iter().filter_map(eval).collect();
        let kind = match kind {
            AdapterKind::Lora => "LoRA",
            AdapterKind::Full => "all weights",
        };
        plot::svg(&format!("{name} ({kind})"), &train, &eval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        let step = |n: u64| Step {
            step: n,
            loss: 2.0 / n as f64,
            grad_norm: 0.1 + 0.2,
            lr: 2e-4,
            tokens: 4096,
            supervised: 512,
            took_ms: 250,
            at_s: 1_750_000_000.125 + n as f64,
            peak_share: (n == 2).then_some(0.43),
            eval_loss: (n == 3).then_some(std::f64::consts::LN_2),
        };
        let mut history = History::default();
        (1..=7).map(step).for_each(|step| history.push(step));
        history
    }

    #[test]
    fn steps_come_back_bit_for_bit() {
        let history = history();
        let lines = history.to_lines();
        assert_eq!(History::parse(lines, 7).unwrap().to_lines(), lines);
        assert_eq!(history.last_eval(), Some(std::f64::consts::LN_2));
        assert_eq!(history.last().unwrap().tokens_per_s(), 16_384.0);
        let torn = &lines[..lines.len() - 9];
        for (text, count) in [(lines, 6), (torn, 7), (b"{}", 1)] {
            assert_eq!(History::parse(text, count), None);
        }
        let second: Vec<u8> = lines.splitn(2, |b| *b == b'\n').nth(1).unwrap().to_vec();
        assert_eq!(History::parse(&second, 6), None, "the first is missing");
    }

    #[test]
    fn events_and_plot_show_both_losses() {
        let history = history();
        let events = history.to_events();
        for tag in ["train/loss", "eval/loss", "train/peak_share"] {
            let count = events
                .windows(tag.len())
                .filter(|w| *w == tag.as_bytes())
                .count();
            assert_eq!(count, if tag == "train/loss" { 7 } else { 1 }, "{tag}");
        }
        let plot = history.to_plot("shop", AdapterKind::Lora);
        assert!(plot.contains("shop (LoRA)") && plot.contains("held-out"));
    }
}
