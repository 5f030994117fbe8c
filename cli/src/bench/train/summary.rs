//! What the facts of a case come to: the figures that people ask for, with their bounds.

use serde_json::{Map, Value};

use super::super::figures::{Bound, Headline};
use super::DATA;

/// Share of the f32 matrix peak that a whole step must reach, by the beginning of the case's name.
const SHARES_MIN: [(&str, f64); 2] = [("256-", 0.4), ("0.6b-", 0.55)];
/// How far memory may be from what was planned.
const APART_MAX: f64 = 0.1;
/// Rendered, tokenized and masked.
const DATA_TOKENS_MIN: f64 = 500_000.0;
/// Tokens a second of Unsloth 2026.10.9 on an H100 with 80 GB, at the better of its settings.
const UNSLOTH: [(&str, f64); 3] = [
    ("4b-2048", 8_970.0),
    ("4b-8192", 17_886.0),
    ("4b-32768", 7_617.0),
];

/// Of one case. What it did not tell is left out; that it did not end is a figure that misses its bound.
pub fn headlines(case: &str, facts: &Map<String, Value>) -> Vec<Headline> {
    let fact = |name: &str| facts.get(name).and_then(Value::as_f64);
    let of = |what: &str| format!("{case}: {what}");
    let mut headlines = Vec::new();
    if facts.get("ended").and_then(Value::as_str) != Some("in good order") {
        headlines
            .push(Headline::new(of("ended in good order"), 0.0, "").bound(Bound::AtLeast(1.0)));
    }
    if let Some(rate) = fact("tokens_per_s") {
        let rate = Headline::new(of("all tokens"), rate, "tokens/s");
        headlines.push(match case == DATA {
            true => rate.bound(Bound::AtLeast(DATA_TOKENS_MIN)),
            false => rate,
        });
    }
    if let Some(rate) = fact("own_tools_tokens_per_s") {
        let what = of("all tokens, no text in common");
        headlines.push(Headline::new(what, rate, "tokens/s"));
    }
    let peer = UNSLOTH.iter().find(|(name, _)| *name == case);
    if let (Some(rate), Some((_, theirs))) = (fact("tokens_per_s"), peer) {
        let what = of("in times of Unsloth on an H100");
        headlines.push(Headline::new(what, rate / theirs, ""));
    }
    if let Some(share) = fact("share_of_peak") {
        let share = Headline::new(of("of the peak of products"), share, "");
        let least = SHARES_MIN.iter().find(|(name, _)| case.starts_with(name));
        headlines.push(match least {
            Some((_, least)) => share.bound(Bound::AtLeast(*least)),
            None => share,
        });
    }
    if let Some(bytes) = fact("memory_bytes") {
        headlines.push(Headline::new(of("memory"), bytes / 1e6, "MB"));
    }
    if let Some(apart) = fact("memory_apart") {
        let apart = Headline::new(of("memory, apart from the plan"), apart, "");
        headlines.push(apart.bound(Bound::AtMost(APART_MAX)));
    }
    headlines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(case: &str, facts: Value) -> Vec<(String, f64, Option<bool>)> {
        let Value::Object(facts) = facts else {
            panic!("{facts}")
        };
        let headlines = headlines(case, &facts).into_iter();
        let short = |one: Headline| (one.what[case.len() + 2..].to_owned(), one.value, one.holds);
        headlines.map(short).collect()
    }

    #[test]
    fn bounds_are_those_of_the_case() {
        let facts = json!({"ended": "in good order", "tokens_per_s": 9000.0, "share_of_peak": 0.5,
            "memory_bytes": 2e6, "memory_apart": 0.11});
        let small = of("256-full", facts.clone());
        let expected = [
            ("all tokens", 9000.0, None),
            ("of the peak of products", 0.5, Some(true)),
            ("memory", 2.0, None),
            ("memory, apart from the plan", 0.11, Some(false)),
        ];
        let expected = expected.map(|(what, value, holds)| (what.to_owned(), value, holds));
        assert_eq!(small, expected);
        assert_eq!(of("0.6b-lora", facts.clone())[1].2, Some(false));
        let large = of("4b-2048", facts);
        assert_eq!(large[1].0, "in times of Unsloth on an H100");
        assert!((large[1].1 - 9000.0 / 8970.0).abs() < 1e-12);
        assert_eq!(large[2].2, None);
    }

    #[test]
    fn what_was_told_before_an_end_stands_and_the_end_is_missed() {
        let facts = json!({"ended": "with code 1", "tokens_per_s": 600_000.0});
        let all = of("data", facts);
        assert_eq!(all[0], ("ended in good order".to_owned(), 0.0, Some(false)));
        assert_eq!(all[1], ("all tokens".to_owned(), 6e5, Some(true)));
    }
}
