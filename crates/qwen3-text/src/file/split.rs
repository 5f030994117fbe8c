//! Which patterns may split text into words. A file brings its own, whoever names the model chooses the file, and the engine
//! that runs it goes back and tries again: a pattern may make it take a time that grows with the square of the text, or worse.
//! So it is one of those that models have, which are known to take a time that grows with the text, or of a form that cannot do
//! otherwise. Pure.

use std::iter::Peekable;
use std::str::Chars;

/// Qwen3's. It always ends a word after the last line break of a run of whitespace.
pub(super) const QWEN3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Patterns of models, by who has them.
const KNOWN: [&str; 6] = [
    QWEN3,
    // Qwen3.5: marks belong to letters.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Llama 3 and GPT-4: numbers in threes.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // GPT-2.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    // GPT-4o.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Sapling, the demonstration model: signs with single blanks between them are one word.
    r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*\n*|\n+| ",
];
/// Longest pattern of another form, in bytes.
const BYTES_MAX: usize = 512;
/// Ways in which an alternative may match before it repeats without a bound.
const WAYS_MAX: u32 = 16;
/// Characters that it may match before.
const LENGTH_MAX: u32 = 64;
/// What is said of all others.
pub(super) const RULE: &str = "must be the pattern of a known model, or alternatives of single characters and classes, \
                               without groups, of which only the last one of an alternative is repeated without a bound";

/// Whether the time that the pattern takes is known to grow with the text and no faster.
pub(super) fn is_bounded(pattern: &str) -> bool {
    KNOWN.contains(&pattern) || pattern.len() <= BYTES_MAX && is_simple(pattern).is_some()
}

/// Something where every alternative is of few bounded parts, the last of which may repeat without a bound: once it has
/// matched, nothing behind it can fail, so that no text is gone over again.
fn is_simple(pattern: &str) -> Option<()> {
    let mut chars = pattern.chars().peekable();
    let (mut ways, mut length, mut has_ended) = (1_u32, 0_u32, false);
    while let Some(char) = chars.next() {
        if char == '|' {
            (ways, length, has_ended) = (1, 0, false);
            continue;
        }
        if has_ended {
            return None;
        }
        part(char, &mut chars)?;
        match repeated(&mut chars)? {
            Repeat::Times(least, most) => {
                ways = ways.saturating_mul(most.checked_sub(least)?.saturating_add(1));
                length = length.saturating_add(most);
            }
            Repeat::Endless(least) => {
                length = length.saturating_add(least);
                has_ended = true;
            }
        }
        if ways > WAYS_MAX || length > LENGTH_MAX {
            return None;
        }
    }
    Some(())
}

/// Passes over a character or a class that begins with `first`.
fn part(first: char, chars: &mut Peekable<Chars<'_>>) -> Option<()> {
    match first {
        '\\' => escape(chars),
        '[' => class(chars),
        '(' | ')' | ']' | '{' | '}' | '*' | '+' | '?' | '^' | '$' => None,
        _ => Some(()),
    }
}

/// What stands behind a backslash: a property, a class, a control character, or a sign that means itself.
fn escape(chars: &mut Peekable<Chars<'_>>) -> Option<()> {
    match chars.next()? {
        'p' | 'P' => {
            chars.next_if_eq(&'{')?;
            let is_name = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '^');
            while chars.next_if(is_name).is_some() {}
            chars.next_if_eq(&'}').map(drop)
        }
        's' | 'S' | 'd' | 'D' | 'w' | 'W' | 'n' | 'r' | 't' | 'f' | 'v' => Some(()),
        sign => sign.is_ascii_punctuation().then_some(()),
    }
}

/// The rest of a class, in which no other class stands.
fn class(chars: &mut Peekable<Chars<'_>>) -> Option<()> {
    chars.next_if_eq(&'^');
    let mut is_empty = true;
    loop {
        match chars.next()? {
            ']' => return (!is_empty).then_some(()),
            '[' => return None,
            '&' if chars.peek() == Some(&'&') => return None,
            '\\' => escape(chars)?,
            _ => {}
        }
        is_empty = false;
    }
}

/// How often what stands before comes.
enum Repeat {
    /// At least and at most so often.
    Times(u32, u32),
    /// At least so often.
    Endless(u32),
}

/// How what stands before is repeated; none: in a way that is not understood here.
fn repeated(chars: &mut Peekable<Chars<'_>>) -> Option<Repeat> {
    let is_repeat = |c: &char| matches!(c, '*' | '+' | '?' | '{');
    let repeat = match chars.next_if(is_repeat) {
        None => return Some(Repeat::Times(1, 1)),
        Some('*') => Repeat::Endless(0),
        Some('+') => Repeat::Endless(1),
        Some('?') => Repeat::Times(0, 1),
        Some(_) => interval(chars)?,
    };
    // Another one would change what this one means.
    match chars.peek().is_some_and(is_repeat) {
        true => None,
        false => Some(repeat),
    }
}

/// `n}`, `n,}` or `n,m}`.
fn interval(chars: &mut Peekable<Chars<'_>>) -> Option<Repeat> {
    let least = number(chars)?;
    if chars.next_if_eq(&',').is_none() {
        chars.next_if_eq(&'}')?;
        return Some(Repeat::Times(least, least));
    }
    if chars.next_if_eq(&'}').is_some() {
        return Some(Repeat::Endless(least));
    }
    let most = number(chars)?;
    chars.next_if_eq(&'}')?;
    Some(Repeat::Times(least, most))
}

fn number(chars: &mut Peekable<Chars<'_>>) -> Option<u32> {
    let mut number = chars.next_if(char::is_ascii_digit)?.to_digit(10)?;
    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
        number = number
            .saturating_mul(10)
            .saturating_add(digit.to_digit(10)?);
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_models_and_simple_ones_are_taken() {
        for pattern in KNOWN {
            assert!(is_bounded(pattern), "{pattern}");
        }
        for pattern in [
            r"\p{L}+|\p{N}|[^\S\n]+|\n+",
            r"\p{N}{1,3}|\P{N}+",
            r" ?\p{L}{2,}|[^\r\n\p{L}]?x|\.|é*|.",
            r"a{3}b?c{0,3}[\]\[-]+",
        ] {
            assert!(is_bounded(pattern), "{pattern}");
        }
    }

    #[test]
    fn what_may_go_over_a_text_again_and_again_is_not() {
        for pattern in [
            "(a+)+b",
            "(?:a|a)*b",
            "a*b",
            "x|a+a+",
            r"\s+$",
            r"(.)\1",
            r"\1",
            "a++b",
            "a+?b",
            "a{2}{3}+b",
            "a{1,99}",
            "a{1,9}a{1,9}b",
            "a{,3}",
            "a{3,1}",
            "[a-z&&[^b]]+",
            "[[:alpha:]]+",
            "[",
            "[]a]",
            "(",
            r"\p{L",
            r"\X+",
            r"\",
            "*",
        ] {
            assert!(!is_bounded(pattern), "{pattern}");
        }
        assert!(!is_bounded(&"a".repeat(BYTES_MAX + 1)));
    }

    /// What is taken takes no time on what makes others slow.
    #[test]
    fn known_patterns_go_over_a_text_once() {
        let runs = [
            " ", "\n", "a", "A", "1", "!", "! ", "\u{301}", "中", "'", "a\u{301}",
        ];
        for pattern in KNOWN {
            let regex = tokenizers::utils::SysRegex::new(pattern).unwrap();
            for run in runs {
                let text = run.repeat(200_000) + "\u{1}";
                // One that goes back over the run at each of its places takes longer than a test may.
                let words = regex.find_iter(&text);
                let is_forward = words.is_sorted_by(|a, b| a.1 <= b.0);
                assert!(is_forward, "{pattern}: {run:?}");
            }
        }
    }
}
