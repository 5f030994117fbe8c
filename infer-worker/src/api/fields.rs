//! Reading a JSON object field by field, so that every refusal names the field, its value and the rule, and so that what
//! was not read is known.

use serde_json::{Map, Value};

use super::error::ApiError;

/// Most that a body may weigh. What is parsed takes some eighty bytes for each unit.
const WEIGHT_MAX: usize = 2 << 20;

/// Names of unknown fields that are told back, in bytes all together.
const IGNORED_BYTES_MAX: usize = 256;

/// An object whose fields are taken out one by one. Null counts as absent.
#[derive(Debug)]
pub(super) struct Fields {
    map: Map<String, Value>,
    at: String,
}

/// What a number must satisfy, in words and as a test of the value that is computed with: JSON's numbers are finer, and
/// those next to a bound become the bound.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    pub(super) words: &'static str,
    pub(super) holds: fn(f32) -> bool,
}

impl Fields {
    /// The body of a request.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|error| {
            let at = error.valid_up_to();
            ApiError::body(format!(
                "the body must be UTF-8, and is not from byte {at} on"
            ))
        })?;
        let weight = weight(text);
        if weight > WEIGHT_MAX {
            return Err(ApiError::body(format!(
                "the body must have at most {WEIGHT_MAX} JSON values, of which an object counts as 8, also within \
                 strings, got {weight}"
            )));
        }
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self {
                map,
                at: String::new(),
            }),
            Ok(_) => Err(ApiError::body("the body must be a JSON object")),
            Err(error) => Err(broken_json(text, &error)),
        }
    }

    /// The object at `at`.
    pub(super) fn of(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self {
                map,
                at: format!("{at}."),
            }),
            other => Err(ApiError::field(at, "must be an object", &other)),
        }
    }

    /// The full name of a field, as refusals call it.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.at)
    }

    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        // Swapping keeps this cheap; the order of what is left does not matter.
        self.map.swap_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn number(&mut self, name: &str, rule: Rule) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_f64().map(|number| number as f32) {
            Some(number) if (rule.holds)(number) && number.is_finite() => Ok(Some(number)),
            _ => Err(ApiError::field(self.path(name), rule.words, &value)),
        }
    }

    pub(super) fn whole(
        &mut self,
        name: &str,
        words: &str,
        holds: impl Fn(i64) -> bool,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match whole(&value) {
            Some(number) if holds(number) => Ok(Some(number)),
            _ => Err(ApiError::field(self.path(name), words, &value)),
        }
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(ApiError::field(
                self.path(name),
                "must be true or false",
                &other,
            )),
        }
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::field(self.path(name), "must be a string", &other)),
        }
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        let at = self.path(name);
        self.take(name)
            .map(|value| Self::of(value, &at))
            .transpose()
    }

    pub(super) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(ApiError::field(self.path(name), "must be a list", &other)),
        }
    }

    /// A list of token ids below `vocabulary`.
    pub(super) fn ids(
        &mut self,
        name: &str,
        vocabulary: u32,
    ) -> Result<Option<Vec<u32>>, ApiError> {
        let path = self.path(name);
        let list = self.list(name)?;
        list.map(|list| ids(&list, &path, vocabulary)).transpose()
    }

    /// What is left, as an object.
    pub(super) fn into_rest(self) -> Map<String, Value> {
        self.map
    }

    /// The names of fields that were not taken, fit for a header.
    pub(super) fn ignored(&self) -> String {
        let plain = |name: &&String| {
            let mut bytes = name.bytes();
            !name.is_empty() && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let mut names = String::new();
        for name in self.map.keys().filter(plain) {
            if names.len() + name.len() + 1 > IGNORED_BYTES_MAX {
                break;
            }
            if !names.is_empty() {
                names.push(',');
            }
            names.push_str(name);
        }
        names
    }
}

/// How many values a text has, at most, and objects for what they take beside. Strings count as the rest does: some hold
/// JSON that is parsed in its turn, and escapes that may be such.
fn weight(text: &str) -> usize {
    let weight = |byte| match byte {
        b'{' => 8,
        b',' | b'[' | b'\\' => 1,
        _ => 0,
    };
    text.bytes().map(weight).sum()
}

/// A whole number, also when it is written as `3.0`.
pub(super) fn whole(value: &Value) -> Option<i64> {
    let exact = |number: &f64| number.fract() == 0.0 && number.abs() < 9e15;
    value
        .as_i64()
        .or_else(|| value.as_f64().filter(exact).map(|number| number as i64))
}

/// Token ids below `vocabulary`.
pub(super) fn ids(list: &[Value], path: &str, vocabulary: u32) -> Result<Vec<u32>, ApiError> {
    let id = |(i, value): (usize, &Value)| {
        let id = whole(value).and_then(|id| u32::try_from(id).ok());
        id.filter(|id| *id < vocabulary).ok_or_else(|| {
            let rule = format!("must be a token id below {vocabulary}");
            ApiError::field(format!("{path}[{i}]"), &rule, value)
        })
    };
    list.iter().enumerate().map(id).collect()
}

/// Python writes NaN and infinities as words that JSON does not have: then the field is named.
fn broken_json(text: &str, error: &serde_json::Error) -> ApiError {
    let (line, column) = (error.line(), error.column());
    let line_start = text
        .split_inclusive('\n')
        .take(line.saturating_sub(1))
        .map(str::len)
        .sum::<usize>();
    let end = text.floor_char_boundary(line_start + column);
    let start = text.floor_char_boundary(end.saturating_sub(16));
    let words = ["NaN", "-Infinity", "Infinity"];
    let near = start..text.len();
    let found = words.into_iter().find_map(|word| {
        let at = text[near.clone()].find(word)? + near.start;
        (at <= end).then_some((at, word))
    });
    let key = found.and_then(|(at, word)| {
        let before = text[..at].trim_end().strip_suffix(':')?.trim_end();
        let before = before.strip_suffix('"')?;
        Some((&before[before.rfind('"')? + 1..], word))
    });
    match key {
        Some((key, word)) => {
            let key = espalier_core::error::shorten(key);
            ApiError::about(
                &key,
                format!("`{key}` must be a number that JSON has, got {word}"),
            )
        }
        None => ApiError::body(format!(
            "the body is not JSON (line {line}, column {column})"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: Rule = Rule {
        words: "must be in (0, 1]",
        holds: |p| p > 0.0 && p <= 1.0,
    };

    #[test]
    fn refusals_name_field_value_and_rule() {
        let mut fields =
            Fields::parse(br#"{"top_p": 0, "n": 1.5, "stop": null, "x": "y"}"#).unwrap();
        let error = fields.number("top_p", UNIT).unwrap_err();
        assert_eq!(error.to_string(), "`top_p` must be in (0, 1], got 0");
        assert_eq!(error.param(), Some("top_p"));
        let error = fields
            .whole("n", "must be a whole number", |_| true)
            .unwrap_err();
        assert_eq!(error.to_string(), "`n` must be a whole number, got 1.5");
        assert_eq!(fields.text("stop"), Ok(None));
        let error = fields.flag("x").unwrap_err();
        assert_eq!(error.to_string(), "`x` must be true or false, got \"y\"");
    }

    #[test]
    fn numbers_that_json_does_not_have_are_refused_by_name() {
        for (body, param) in [
            (r#"{"a": 1, "temperature": NaN}"#, Some("temperature")),
            (
                "{\"a\": 1,\n \"temperature\" :\n -Infinity}",
                Some("temperature"),
            ),
            (r#"{"a": NaNs, "b"}"#, Some("a")),
            (r#"{"a": 1,}"#, None),
            (r#"{"a": 1e999}"#, None),
            ("", None),
            (r#"{"NaN": é}"#, None),
        ] {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert_eq!(error.param(), param, "{body}: {error}");
        }
    }

    #[test]
    fn a_small_text_must_not_become_a_large_tree() {
        let objects = |count| format!("{{\"a\": [{}0]}}", "{\"\":0},".repeat(count));
        assert!(Fields::parse(objects(200_000).as_bytes()).is_ok());
        let error = Fields::parse(objects(300_000).as_bytes()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("at most 2097152 JSON values"), "{message}");
        assert!(message.ends_with("got 2700009"), "{message}");
        let ids = format!("{{\"prompt\": [{}0]}}", "7,".repeat(2_000_000));
        assert!(Fields::parse(ids.as_bytes()).is_ok());
    }

    #[test]
    fn bytes_that_are_no_text_are_refused() {
        let error = Fields::parse(b"{\"a\": \"\xff\"}").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the body must be UTF-8, and is not from byte 7 on"
        );
    }

    #[test]
    fn what_was_not_taken_is_told_if_it_fits_a_header() {
        let mut fields =
            Fields::parse(r#"{"n": 1, "user": 2, "é": 3, "a b": 4, "store": 5}"#.as_bytes())
                .unwrap();
        fields.take("n");
        let ignored = fields.ignored();
        let mut names: Vec<&str> = ignored.split(',').collect();
        names.sort_unstable();
        assert_eq!(names, ["store", "user"]);
    }
}
