//! `${name}` in the texts of a job, replaced by what `--var name=value` says. `$${name}` stands for itself without
//! the first dollar sign, and every other use of a dollar sign is left alone: scripts are full of them.

use std::collections::BTreeMap;

use espalier_core::error::FieldError;
use serde_json::Value;

/// Names and what they stand for.
pub type Vars = BTreeMap<String, String>;

/// Replaces in every text under `value`, keys excepted.
///
/// # Errors
/// Names the field that uses a variable which nobody gave.
pub fn replace(value: &mut Value, vars: &Vars) -> Result<(), FieldError> {
    replace_at(value, vars, "")
}

fn replace_at(value: &mut Value, vars: &Vars, path: &str) -> Result<(), FieldError> {
    match value {
        Value::String(text) if text.contains("${") => {
            *text = replace_text(text, vars).map_err(|name| unknown(path, &name, vars))?;
            Ok(())
        }
        Value::Array(items) => {
            let mut items = items.iter_mut().enumerate();
            items.try_for_each(|(i, item)| replace_at(item, vars, &format!("{path}[{i}]")))
        }
        Value::Object(fields) => fields.iter_mut().try_for_each(|(name, item)| {
            let dot = if path.is_empty() { "" } else { "." };
            replace_at(item, vars, &format!("{path}{dot}{name}"))
        }),
        _ => Ok(()),
    }
}

/// The text with its variables replaced, or the name of one that nobody gave.
fn replace_text(text: &str, vars: &Vars) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, from) = rest.split_at(at);
        let Some(name) = name_of(from) else {
            out.push_str(before);
            out.push_str("${");
            rest = &from[2..];
            continue;
        };
        let whole = &from[..name.len() + 3];
        match before.strip_suffix('$') {
            Some(before) => {
                out.push_str(before);
                out.push_str(whole);
            }
            None => {
                out.push_str(before);
                out.push_str(vars.get(name).ok_or(name)?);
            }
        }
        rest = &from[whole.len()..];
    }
    out.push_str(rest);
    Ok(out)
}

/// The name in a text that begins with `${name}`.
fn name_of(from: &str) -> Option<&str> {
    let (name, _) = from.strip_prefix("${")?.split_once('}')?;
    let first = name.bytes().next()?;
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (!first.is_ascii_digit() && name.bytes().all(word)).then_some(name)
}

fn unknown(path: &str, name: &str, vars: &Vars) -> FieldError {
    let known: Vec<&str> = vars.keys().map(String::as_str).collect();
    let known = match known[..] {
        [] => "none is given".to_owned(),
        _ => format!("given are {}", known.join(", ")),
    };
    let rule = format!("must use variables of --var only ({known}); add `--var {name}=…`");
    FieldError::new(path, format!("${{{name}}}"), rule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vars() -> Vars {
        Vars::from([("site".to_owned(), "http://h".to_owned())])
    }

    #[test]
    fn variables_are_replaced_everywhere_but_in_keys() {
        let mut value = json!({"prompt": ["at ${site}/a and ${site}"], "verify": {"${site}": "${site}"}, "n": 1});
        replace(&mut value, &vars()).unwrap();
        let expected = json!({"prompt": ["at http://h/a and http://h"], "verify": {"${site}": "http://h"}, "n": 1});
        assert_eq!(value, expected);
    }

    #[test]
    fn an_unknown_variable_names_its_field() {
        let mut value = json!({"prompt": ["x", "${sit}"]});
        let error = replace(&mut value, &vars()).unwrap_err();
        assert_eq!(
            (error.field.as_str(), error.value.as_str()),
            ("prompt[1]", "${sit}")
        );
        assert!(error.rule.contains("given are site"), "{}", error.rule);
    }

    #[test]
    fn other_dollars_stay() {
        for (text, expected) in [
            ("$5 ${", "$5 ${"),
            ("`${a.b}` ${1} ${}", "`${a.b}` ${1} ${}"),
            ("$${site} ${site}", "${site} http://h"),
            ("$$${site}", "$${site}"),
        ] {
            assert_eq!(replace_text(text, &vars()).unwrap(), expected);
        }
    }
}
