//! How far a training is, as its worker tells it: one line that people read and the CLI takes apart.
//!
//! ```text
//! step 120/1000 loss 1.2345 grad 0.5312 tok/s 5200 eval 1.3001 peak 0.43 mem 412 left 95
//! ```
//! Loss and gradient are of the last step, `eval` of the last measurement on held-out samples, `peak` the share of the
//! machine's matrix peak, `mem` in MiB, `left` in seconds. What is not known is left out.

use std::fmt;
use std::str::FromStr;

/// How far a training is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TrainProgress {
    /// Steps that are done.
    pub step: u64,
    /// Of how many.
    pub steps: u64,
    /// Mean loss of the last step's supervised tokens.
    pub loss: f64,
    /// Norm of the last step's gradient, before it was clipped.
    pub grad_norm: f64,
    /// Tokens that go through the model in a second.
    pub tokens_per_s: f64,
    /// Mean loss of the held-out samples, when they were last measured.
    pub eval_loss: Option<f64>,
    /// Share of the machine's matrix peak.
    pub peak_share: Option<f64>,
    /// Memory of the process, in MiB.
    pub memory_mib: Option<u64>,
    /// Seconds that are left, at this speed.
    pub left_s: Option<u64>,
}

impl fmt::Display for TrainProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            step,
            steps,
            loss,
            grad_norm,
            tokens_per_s,
            ..
        } = self;
        write!(
            f,
            "step {step}/{steps} loss {loss:.4} grad {grad_norm:.4} tok/s {tokens_per_s:.0}"
        )?;
        if let Some(loss) = self.eval_loss {
            write!(f, " eval {loss:.4}")?;
        }
        if let Some(share) = self.peak_share {
            write!(f, " peak {share:.2}")?;
        }
        if let Some(mib) = self.memory_mib {
            write!(f, " mem {mib}")?;
        }
        if let Some(left) = self.left_s {
            write!(f, " left {left}")?;
        }
        Ok(())
    }
}

/// The text is not how far a training is: it says something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoProgress;

impl FromStr for TrainProgress {
    type Err = NoProgress;

    /// What it does not know is passed over: a later worker may tell more.
    fn from_str(text: &str) -> Result<Self, NoProgress> {
        let mut words = text.split(' ');
        let mut progress = Self::default();
        let mut has_steps = false;
        while let Some((name, value)) = words.next().zip(words.next()) {
            let number = || value.parse().map_err(|_| NoProgress);
            let whole = || value.parse().map_err(|_| NoProgress);
            match name {
                "step" => {
                    let (step, steps) = value.split_once('/').ok_or(NoProgress)?;
                    progress.step = step.parse().map_err(|_| NoProgress)?;
                    progress.steps = steps.parse().map_err(|_| NoProgress)?;
                    has_steps = true;
                }
                "loss" => progress.loss = number()?,
                "grad" => progress.grad_norm = number()?,
                "tok/s" => progress.tokens_per_s = number()?,
                "eval" => progress.eval_loss = Some(number()?),
                "peak" => progress.peak_share = Some(number()?),
                "mem" => progress.memory_mib = Some(whole()?),
                "left" => progress.left_s = Some(whole()?),
                _ => {}
            }
        }
        has_steps.then_some(progress).ok_or(NoProgress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_reads_back_what_it_writes() {
        let text = "step 120/1000 loss 1.2345 grad 0.5312 tok/s 5200 eval 1.3001 peak 0.43 mem 412 left 95";
        let progress: TrainProgress = text.parse().unwrap();
        assert_eq!(progress.to_string(), text);
        assert_eq!((progress.step, progress.left_s), (120, Some(95)));
        let short = TrainProgress {
            step: 1,
            steps: 2,
            ..TrainProgress::default()
        };
        assert_eq!(short.to_string().parse(), Ok(short));
        assert!(text.len() < 200, "what a worker may say has 200 bytes");
    }

    #[test]
    fn other_texts_are_no_progress_and_unknown_words_no_fault() {
        for other in ["", "publishing", "loading the model", "step x/9", "step 1"] {
            assert_eq!(other.parse::<TrainProgress>(), Err(NoProgress), "{other}");
        }
        let more: TrainProgress = "step 1/2 loss 3 sparkle 7".parse().unwrap();
        assert_eq!(more.loss, 3.0);
    }
}
