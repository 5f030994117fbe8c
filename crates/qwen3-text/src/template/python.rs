//! What Python writes where a template turns values into text: `json.dumps` and `str`.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State};
use serde_json::Value as Json;

/// The `tojson` of transformers' templates: `json.dumps` without escapes for ASCII or HTML.
pub(super) fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    if value.is_undefined() {
        let what = "an undefined value has no JSON";
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    let indent: Option<usize> = options.get("indent")?;
    let mut json = serde_json::to_value(&value)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, "tojson").with_source(e))?;
    if options.get::<Option<bool>>("sort_keys")?.unwrap_or(false) {
        json.sort_all_objects();
    }
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?;
    options.assert_all_used()?;
    let mut text = String::new();
    write_json(&json, indent, 0, &mut text);
    if ensure_ascii.unwrap_or(false) {
        text = escape_non_ascii(&text);
    }
    Ok(Value::from_safe_string(text))
}

/// Writes an expression's value as Jinja does; a list or a map, which Python would write in its own notation, is
/// refused rather than written in another.
pub(super) fn write_value(out: &mut Output, _: &mut State, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Undefined => return Ok(()),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool if value.is_true() => "True".to_owned(),
        ValueKind::Bool => "False".to_owned(),
        ValueKind::Number if !value.is_integer() => float(f64::try_from(value.clone())?),
        ValueKind::Number => value.to_string(),
        ValueKind::String => {
            return out
                .write_str(value.as_str().unwrap_or_default())
                .map_err(Error::from);
        }
        kind => {
            let what = format!("a {kind} is not text");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
    };
    out.write_str(&text).map_err(Error::from)
}

fn write_json(value: &Json, indent: Option<usize>, depth: usize, out: &mut String) {
    match value {
        Json::Number(number) => match number.as_f64() {
            Some(value) if number.is_f64() => out.push_str(&float(value)),
            _ => out.push_str(&number.to_string()),
        },
        Json::Array(items) => {
            out.push('[');
            for (n, item) in items.iter().enumerate() {
                separate(n, indent, depth + 1, out);
                write_json(item, indent, depth + 1, out);
            }
            close(items.len(), indent, depth, out);
            out.push(']');
        }
        Json::Object(fields) => {
            out.push('{');
            for (n, (key, value)) in fields.iter().enumerate() {
                separate(n, indent, depth + 1, out);
                out.push_str(&Json::from(key.as_str()).to_string());
                out.push_str(": ");
                write_json(value, indent, depth + 1, out);
            }
            close(fields.len(), indent, depth, out);
            out.push('}');
        }
        // serde_json escapes strings exactly as Python does.
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// What comes before item `n`.
fn separate(n: usize, indent: Option<usize>, depth: usize, out: &mut String) {
    match indent {
        Some(width) => {
            out.push_str(if n > 0 { ",\n" } else { "\n" });
            out.push_str(&" ".repeat(width * depth));
        }
        None if n > 0 => out.push_str(", "),
        None => {}
    }
}

/// What comes after the last of `len` items.
fn close(len: usize, indent: Option<usize>, depth: usize, out: &mut String) {
    if let (Some(width), true) = (indent, len > 0) {
        out.push('\n');
        out.push_str(&" ".repeat(width * depth));
    }
}

/// Python's `repr` of a float: the shortest digits that read back the same, of two equally near the even ones, with an
/// exponent below 1e-4 and from 1e16.
fn float(value: f64) -> String {
    let scientific = even(value, format!("{value:e}"));
    let Some((digits, exponent)) = scientific.split_once('e') else {
        // Not finite, which JSON does not hold.
        return scientific.to_lowercase();
    };
    let decimals = digits.split_once('.').map_or(0, |(_, after)| after.len());
    match exponent.parse::<i32>() {
        Ok(exponent @ -4..16) => {
            let decimals = decimals as i32 - exponent;
            match usize::try_from(decimals) {
                Ok(decimals @ 1..) => format!("{value:.decimals$}"),
                _ => format!("{value:.1}"),
            }
        }
        Ok(exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        Err(_) => scientific,
    }
}

/// `shortest` with its last digit even, where an odd one is as near.
fn even(value: f64, shortest: String) -> String {
    let digits = shortest.chars().take_while(|c| *c != 'e');
    let decimals = digits.skip_while(|c| *c != '.').skip(1).count();
    let rounded = format!("{value:.decimals$e}");
    match rounded.parse() == Ok(value) {
        true => rounded,
        false => shortest,
    }
}

/// `text` with characters beyond ASCII as `\uXXXX`, in pairs of surrogates where one does not do.
fn escape_non_ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            out.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut [0; 2]) {
            out.push_str(&format!("\\u{unit:04x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        // Each read from Python's `repr`.
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (100.0, "100.0"),
            (0.0001, "0.0001"),
            (0.00001234, "1.234e-05"),
            (9_999_999_999_999_998.0, "9999999999999998.0"),
            (1e16, "1e+16"),
            // As near to .3.
            (7_570_953_080_563_634.0 / 8.0, "946369135070454.2"),
            (1.5e300, "1.5e+300"),
            (5e-324, "5e-324"),
            (-2.5e-10, "-2.5e-10"),
            (f64::MAX, "1.7976931348623157e+308"),
        ] {
            assert_eq!(float(value), text);
        }
        // Read with its last digit only by serde_json's `float_roundtrip`.
        let read: Json = serde_json::from_str("3.9957357531725414e-19").unwrap();
        let mut written = String::new();
        write_json(&read, None, 0, &mut written);
        assert_eq!(written, "3.9957357531725414e-19");
    }

    #[test]
    fn options_of_tojson_are_those_of_python() {
        let environment = {
            let mut environment = minijinja::Environment::new();
            environment.add_filter("tojson", tojson);
            environment
        };
        let value = json!({"b": [1, {"c": null}], "a": {}, "é": [], "𝒳": "<'&\u{7f}"});
        let render = |options: &str| {
            let template = format!("{{{{ x | tojson({options}) }}}}");
            let variables =
                minijinja::context! { x => Value::from(minijinja::value::Serde(&value)) };
            environment.render_str(&template, variables)
        };
        assert_eq!(
            render("").unwrap(),
            "{\"b\": [1, {\"c\": null}], \"a\": {}, \"é\": [], \"𝒳\": \"<'&\u{7f}\"}"
        );
        assert_eq!(
            render("indent=2, sort_keys=true").unwrap(),
            "{\n  \"a\": {},\n  \"b\": [\n    1,\n    {\n      \"c\": null\n    }\n  ],\n  \"é\": [],\n  \"𝒳\": \"<'&\u{7f}\"\n}"
        );
        assert_eq!(
            render("ensure_ascii=true").unwrap(),
            "{\"b\": [1, {\"c\": null}], \"a\": {}, \"\\u00e9\": [], \"\\ud835\\udcb3\": \"<'&\u{7f}\"}"
        );
        assert!(render("separators=1").is_err());
        assert!(
            environment
                .render_str("{{ missing | tojson }}", ())
                .is_err()
        );
    }
}
