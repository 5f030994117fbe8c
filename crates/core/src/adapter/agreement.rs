//! How near a training is to serving.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Mean up to which rounding to f32 explains a difference, in nats.
const F32_MAX: f64 = 1e-4;
/// Mean up to which rounding to bf16 explains one, in nats.
const BF16_MAX: f64 = 2e-2;
/// Longest reason that is kept, in characters: it may quote what an endpoint said.
const WHY_CHARS_MAX: usize = 512;

/// What came of holding a training against serving: of tokens that the base model sampled while it was served, the
/// log-probability that was recorded then, and the one that training computes before its first step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Agreement {
    /// How far they are apart.
    Measured(Difference),
    /// There was nothing to compare.
    Unmeasured {
        /// Why, in words.
        unmeasured: String,
    },
}

/// How far log-probabilities are apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Traces that were looked at.
    pub traces: u64,
    /// Sampled tokens of these.
    pub tokens: u64,
    /// Mean of the differences' amounts, in nats.
    pub mean: f64,
    /// The largest amount, in nats.
    pub max: f64,
}

impl Agreement {
    /// None, with its reason.
    pub fn unmeasured(why: &str) -> Self {
        Self::Unmeasured {
            unmeasured: why.chars().take(WHY_CHARS_MAX).collect(),
        }
    }

    /// Whether no rounding explains it.
    pub fn is_too_far(&self) -> bool {
        self.difference().is_some_and(Difference::is_too_far)
    }

    /// The difference, where it was measured.
    pub fn difference(&self) -> Option<&Difference> {
        match self {
            Self::Measured(difference) => Some(difference),
            Self::Unmeasured { .. } => None,
        }
    }

    /// In few words, for a line that says more.
    pub fn short(&self) -> String {
        match self {
            Self::Measured(difference) if self.is_too_far() => {
                format!("agreement {:.0e}, too far", difference.mean)
            }
            Self::Measured(difference) => format!("agreement {:.0e}", difference.mean),
            Self::Unmeasured { .. } => "agreement not measured".to_owned(),
        }
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Measured(difference) => difference.fmt(f),
            Self::Unmeasured { unmeasured } => write!(f, "not measured: {unmeasured}"),
        }
    }
}

impl Difference {
    /// Of what was recorded and what was computed, token by token; none where there is no token, or a difference is no
    /// number.
    pub fn of(traces: u64, pairs: impl IntoIterator<Item = (f32, f32)>) -> Option<Self> {
        let (mut tokens, mut sum, mut max) = (0_u64, 0.0, 0.0_f64);
        for (recorded, computed) in pairs {
            let difference = (f64::from(recorded) - f64::from(computed)).abs();
            if !difference.is_finite() {
                return None;
            }
            tokens += 1;
            sum += difference;
            max = max.max(difference);
        }
        (tokens > 0).then(|| Self {
            traces,
            tokens,
            mean: sum / tokens as f64,
            max,
        })
    }

    /// Whether no rounding explains it, so that what was served is hardly what is trained.
    pub fn is_too_far(&self) -> bool {
        self.mean > BF16_MAX
    }

    /// What explains it. A trace does not say in which numbers the model was served, so that its size has to tell.
    fn because(&self) -> &'static str {
        match self.mean {
            ..=F32_MAX => "as f32 rounds",
            ..=BF16_MAX => "as bf16 rounds, and more than f32 does",
            _ => {
                "more than bf16 explains: another model, revision or adapter was served, or in numbers such as q8"
            }
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            traces,
            tokens,
            mean,
            max,
        } = self;
        let because = self.because();
        write!(
            f,
            "log-probabilities of {tokens} tokens of {traces} traces differ by {mean:.1e} on average and {max:.1e} at most, \
             {because}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_of_amounts_and_of_numbers() {
        let difference = Difference::of(2, [(-1.0, -1.5), (-2.0, -1.75), (-0.5, -0.5)]);
        let expected = Difference {
            traces: 2,
            tokens: 3,
            mean: 0.25,
            max: 0.5,
        };
        assert_eq!(difference, Some(expected));
        assert_eq!(Difference::of(1, []), None);
        assert_eq!(Difference::of(1, [(-1.0, f32::NAN)]), None);
        assert_eq!(Difference::of(1, [(-1.0, f32::NEG_INFINITY)]), None);
    }

    #[test]
    fn its_size_is_told_in_words() {
        let told = |mean| {
            let difference = Difference {
                traces: 2,
                tokens: 9,
                mean,
                max: 0.5,
            };
            let agreement = Agreement::Measured(difference);
            (agreement.short(), agreement.to_string())
        };
        let (short, long) = told(3.14e-6);
        assert_eq!(short, "agreement 3e-6");
        assert_eq!(
            long,
            "log-probabilities of 9 tokens of 2 traces differ by 3.1e-6 on average and 5.0e-1 at most, as f32 rounds"
        );
        let (short, long) = told(2e-2);
        assert_eq!(short, "agreement 2e-2");
        assert!(
            long.ends_with(", as bf16 rounds, and more than f32 does"),
            "{long}"
        );
        let (short, long) = told(2.1e-2);
        assert_eq!(short, "agreement 2e-2, too far");
        assert!(long.contains("more than bf16 explains"), "{long}");
        let none = Agreement::unmeasured(&"x".repeat(2 * WHY_CHARS_MAX));
        assert_eq!(
            none.to_string().len(),
            "not measured: ".len() + WHY_CHARS_MAX
        );
        assert_eq!(none.short(), "agreement not measured");
    }

    #[test]
    fn both_are_told_apart_where_they_are_stored() {
        let measured = r#"{"traces":2,"tokens":9,"mean":1e-7,"max":3e-7}"#;
        let unmeasured = r#"{"unmeasured":"no trace"}"#;
        for (text, is_measured) in [(measured, true), (unmeasured, false)] {
            let read: Agreement = serde_json::from_str(text).unwrap();
            assert_eq!(read.difference().is_some(), is_measured);
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
        }
    }
}
