//! Patterns that jobs bring along: globs, JSON paths and regular expressions, bounded before any parser sees them.
//!
//! Their parsers recurse, and what they make of a text of a few hundred bytes can keep a processor busy for hours. The
//! door and the worker compile with these same functions, so that what the one accepts never fails at the other. Not
//! here: the bounds of the values that a path runs over, which the worker's verifiers keep.

use serde_json_path::JsonPath;

/// Longest glob or JSON path, in bytes: names of tools have 64, and people read what they write.
const BYTES_MAX: usize = 1024;
/// Deepest nesting of brackets, parentheses and braces: far beyond what people write, far below any stack.
const NESTING_MAX: usize = 16;
/// Most `..` of a path: each one multiplies the nodes by the depth of the value.
const PATH_DESCENTS_MAX: usize = 2;
/// Most filters of a path: each one may look at the whole value for every node.
const PATH_FILTERS_MAX: usize = 2;
/// Most commas of a path: `[*,*]` doubles the nodes, and the next one does so again.
const PATH_COMMAS_MAX: usize = 4;
/// Deepest nesting of a regular expression, as its parser counts: three levels for a group.
const REGEX_NESTING_MAX: u32 = 96;
/// Largest compiled form of a regular expression, in bytes: an honest pattern that repeats Unicode classes comes to a
/// megabyte or more. The default is five times as much, and a chunk may bring thousands.
const REGEX_BYTES_MAX: usize = 2 << 20;

/// What is wrong with a pattern: the rule that it breaks, for a [`FieldError`](crate::error::FieldError).
pub type Rule = String;

/// A compiled glob.
#[derive(Clone, Debug)]
pub struct Glob(regex::bytes::Regex);

impl Glob {
    /// Compiles `text`, or tells the rule that it breaks.
    ///
    /// # Errors
    /// The text is out of bounds or no glob.
    pub fn new(text: &str) -> Result<Self, Rule> {
        check_bounds(text)?;
        let refused = |reason: String| format!("must be a glob: {reason}");
        let glob = globset::Glob::new(text).map_err(|error| refused(error.kind().to_string()))?;
        // globset's own way from a glob to a matcher panics where this one fails.
        let regex = regex::bytes::RegexBuilder::new(glob.regex())
            .dot_matches_new_line(true)
            .build();
        regex.map(Self).map_err(|error| refused(error.to_string()))
    }

    /// Whether the glob fits the whole of `name`.
    pub fn is_match(&self, name: &str) -> bool {
        self.0.is_match(name.as_bytes())
    }
}

/// Compiles an RFC 9535 path, or tells the rule that it breaks.
///
/// # Errors
/// The text is out of bounds, calls a function that has none, or is no path.
pub fn json_path(text: &str) -> Result<JsonPath, Rule> {
    check_bounds(text)?;
    for (part, max, what) in [
        ("..", PATH_DESCENTS_MAX, "segments `..`"),
        ("?", PATH_FILTERS_MAX, "filters"),
        (",", PATH_COMMAS_MAX, "commas"),
    ] {
        if text.matches(part).count() > max {
            return Err(format!("must have at most {max} {what}"));
        }
    }
    // They compile a regular expression, of the path or of the answer, at every node.
    if text.contains("match(") || text.contains("search(") {
        return Err("must not call `match` or `search`".to_owned());
    }
    JsonPath::parse(text).map_err(|error| format!("must be an RFC 9535 path: {}", error.message()))
}

/// Compiles a regular expression, or tells the rule that it breaks.
///
/// # Errors
/// The text is nested too deep or no regular expression.
pub fn regex(text: &str) -> Result<regex::Regex, Rule> {
    let compiled = regex::RegexBuilder::new(text)
        .nest_limit(REGEX_NESTING_MAX)
        .size_limit(REGEX_BYTES_MAX)
        .dfa_size_limit(REGEX_BYTES_MAX)
        .build();
    compiled.map_err(|error| {
        // The error's own text draws the pattern over several lines; its last line says what is wrong.
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default();
        let reason = reason.trim_start_matches("error: ");
        format!("must be a regular expression: {reason}")
    })
}

/// Length and nesting of a text, for any parser. What stands in quotes or behind a backslash counts too: a counter that
/// left it out would have to agree with every parser on what a quote is.
fn check_bounds(text: &str) -> Result<(), Rule> {
    if text.len() > BYTES_MAX {
        return Err(format!("must have at most {BYTES_MAX} bytes"));
    }
    let mut depth = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > NESTING_MAX {
            return Err(format!(
                "must nest brackets, parentheses and braces at most {NESTING_MAX} deep"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(open: &str, inner: &str, close: &str, depth: usize) -> String {
        format!("{}{inner}{}", open.repeat(depth), close.repeat(depth))
    }

    #[test]
    fn depth_and_length_are_refused_before_any_parser_recurses() {
        for depth in [NESTING_MAX + 1, 100, 400] {
            let braces = nested("{", "a", "}", depth);
            assert!(Glob::new(&braces).unwrap_err().contains("at most 16 deep"));
            let parens = format!("$[?{}]", nested("(", "@.a", ")", depth));
            assert!(json_path(&parens).unwrap_err().contains("at most 16 deep"));
        }
        let long = format!("$[?{}]", nested("(", "@.a", ")", 1000));
        assert!(json_path(&long).unwrap_err().contains("1024 bytes"));
        let long = nested("{", "a", "}", 20_000);
        assert!(Glob::new(&long).unwrap_err().contains("1024 bytes"));
        // A quote hides nothing: a parser may see it otherwise.
        assert!(json_path(&format!("$'{}", "[".repeat(17))).is_err());
        assert!(regex(&nested("(", "a", ")", 400)).is_err());
        let large = regex(r"\w{300}").unwrap_err();
        assert!(large.contains("size limit"), "{large}");
        assert!(regex(r"^[\w.+-]+@[\w-]+\.[\w.]{2,20}$").is_ok());
    }

    #[test]
    fn what_is_within_bounds_compiles_or_is_refused_but_never_panics() {
        let deepest = Glob::new(&nested("{", "a", "}", NESTING_MAX)).unwrap();
        assert!(deepest.is_match("a") && !deepest.is_match("aa"));
        for text in ["{a,b}*", "a\\{", "[!a-c]?", "**/x", "", "{,}", "\u{e9}?"] {
            Glob::new(text).unwrap();
        }
        for text in ["a[b-a]", "{a", "a}", "\\"] {
            assert!(Glob::new(text).unwrap_err().starts_with("must be a glob"));
        }
        let deepest = format!("$[?{}]", nested("(", "@.a", ")", NESTING_MAX - 1));
        json_path(&deepest).unwrap();
        assert!(regex(&nested("(", "a", ")", 16)).unwrap().is_match("a"));
    }

    #[test]
    fn globs_fit_as_in_globset() {
        for (glob, name) in [
            ("browser_*", "browser_click"),
            ("*", "a/b\nc"),
            ("?", "é"),
            ("?", "ab"),
            ("{a,b}", "b"),
            ("[!a]", "a"),
            ("**/x", "y/x"),
            ("a**", "a/b"),
        ] {
            let theirs = globset::Glob::new(glob).unwrap().compile_matcher();
            let ours = Glob::new(glob).unwrap();
            assert_eq!(ours.is_match(name), theirs.is_match(name), "{glob} {name}");
        }
    }

    #[test]
    fn paths_whose_work_multiplies_are_refused() {
        for (path, rule) in [
            ("$..[?@..[?@..a]]", "at most 2 segments `..`"),
            ("$[?@[?@[?@.a]]]", "at most 2 filters"),
            ("$[*,*][*,*][*,*][*,*][*,*]", "at most 4 commas"),
            ("$..[?search(@, 'a')]", "must not call"),
            ("$..[?match(@.a, $.b)]", "must not call"),
            ("$.[", "must be an RFC 9535 path"),
        ] {
            let error = json_path(path).unwrap_err();
            assert!(error.contains(rule), "{path}: {error}");
        }
        for path in [
            "$",
            "$..a[?@.b == 1 && length(@.c) > 2].d",
            "$['a','b'][0,1]",
        ] {
            json_path(path).unwrap();
        }
    }

    #[test]
    fn a_path_of_the_greatest_depth_is_parsed_at_once() {
        let began = std::time::Instant::now();
        for open in ["length(", "value(", "x(", "!(", "("] {
            for (inner, tail) in [("@.a", ""), ("@.a", "==1"), ("1", ""), ("@[?@[?@", "")] {
                let depth = NESTING_MAX - 3;
                let _ = json_path(&format!("$[?{}{tail}]", nested(open, inner, ")", depth)));
                let _ = json_path(&format!("$[?{}", nested(open, inner, "", depth)));
            }
        }
        // A parser that doubled its work at each level would need minutes.
        assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    }
}
