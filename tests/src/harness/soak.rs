//! How many rounds a scenario of random faults plays, and by which numbers: `make soak` asks for more, and a seed that
//! was printed plays the same again.

use rand::RngExt;

/// Rounds to play: `ESPALIER_SOAK_ROUNDS`, or 30.
pub fn rounds() -> u64 {
    number("ESPALIER_SOAK_ROUNDS").unwrap_or(30)
}

/// The seed of the first round: `ESPALIER_SOAK_SEED`, or any.
pub fn seed() -> u64 {
    number("ESPALIER_SOAK_SEED").unwrap_or_else(|| u64::from(rand::rng().random::<u32>()))
}

fn number(name: &str) -> Option<u64> {
    let (_, value) = std::env::vars().find(|(key, _)| key == name)?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name} must be a number, got {value:?}")))
}
