//! What a process computes on, as its options name it: one rule for serving and training.

use std::fmt;
use std::str::FromStr;

/// The GPU that [`DeviceChoice::Auto`] takes, where there is one.
pub const AUTO_ORDINAL: u32 = 0;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of that number.
    Cuda(u32),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").unwrap_or(match text {
            "cuda" => "0",
            _ => "",
        });
        match (text, number.parse()) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            (_, Ok(number)) => Ok(Self::Cuda(number)),
            _ => Err("must be auto, cpu or cuda:N".to_owned()),
        }
    }
}
