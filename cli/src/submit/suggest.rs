//! From "unknown field" to the key that was probably meant.

use espalier_core::error::FieldError;

/// Edits up to which a known key counts as what was meant.
const EDITS_MAX: usize = 3;

/// The same refusal, with the nearest known key where the deserializer lists them.
pub fn improve(mut error: FieldError) -> FieldError {
    let Some((unknown, known)) = parse(&error.rule) else {
        return error;
    };
    let nearest = known
        .iter()
        .map(|key| (distance(unknown, key), *key))
        .filter(|(edits, key)| *edits <= EDITS_MAX && *edits < key.len())
        .min();
    error.rule = match nearest {
        Some((_, key)) => format!("is no known key; did you mean `{key}`?"),
        None => format!("is no known key; known are {}", known.join(", ")),
    };
    error
}

/// The unknown key and the known ones, from serde's message.
fn parse(rule: &str) -> Option<(&str, Vec<&str>)> {
    let (_, rest) = rule.split_once("unknown field `")?;
    let (unknown, rest) = rest.split_once('`')?;
    let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    (!known.is_empty()).then_some((unknown, known))
}

/// Insertions, deletions, replacements and swaps of neighbours that turn one word into the other (optimal string
/// alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) =
        (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::spec::parse_line;

    fn rule(line: &str) -> String {
        improve(parse_line(line.as_bytes()).unwrap_err()).rule
    }

    #[test]
    fn the_nearest_key_is_named() {
        assert_eq!(
            rule(r#"{"promt":"x"}"#),
            "is no known key; did you mean `prompt`?"
        );
        assert_eq!(
            rule(r#"{"limits":{"trun":5}}"#),
            "is no known key; did you mean `turns`?"
        );
    }

    #[test]
    fn a_key_like_no_other_gets_the_list() {
        let rule = rule(r#"{"observation":{"something_else":5}}"#);
        assert_eq!(
            rule,
            "is no known key; known are max_tokens, compat_chars, compact_tokens"
        );
    }

    #[test]
    fn other_refusals_stay_as_they_are() {
        assert!(rule("[]").starts_with("must be a JSON object"));
    }

    #[test]
    fn swaps_count_once() {
        assert_eq!(
            [
                distance("ab", "ba"),
                distance("", "abc"),
                distance("abc", "abc")
            ],
            [1, 3, 0]
        );
    }
}
