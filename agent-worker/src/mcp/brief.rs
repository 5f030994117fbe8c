//! Tools in brief, for models with a short context: what each does in one sentence, and its arguments without a word.
//! Pure. A call on such a tool is checked by its server as any other.

use espalier_core::chat::FunctionDef;
use serde_json::{Map, Value};

/// Of a schema these say what an argument is called, what it may be, and whether it is needed.
const KEPT: [&str; 12] = [
    "type",
    "enum",
    "const",
    "required",
    "properties",
    "items",
    "prefixItems",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
    "$defs",
];

/// `function` with the first sentence of its description, and of its arguments only names, types, allowed values and
/// which are needed. The schema is one that `convert` made, so that it is not too deep.
pub(super) fn brief(function: &mut FunctionDef) {
    function.description = first_sentence(&function.description).to_owned();
    let parameters = std::mem::take(&mut function.parameters);
    function.parameters = brief_schema(parameters);
}

/// Up to the first full stop, question or exclamation mark before a space, or the end of the line. A point after a word
/// with points (`e.g.`) ends no sentence.
fn first_sentence(text: &str) -> &str {
    let text = text.trim();
    let line = text.lines().next().unwrap_or_default().trim_end();
    let mut word_at = 0;
    for (at, char) in line.char_indices() {
        if char.is_whitespace() {
            let word = &line[word_at..at];
            let is_abbreviation = word.trim_end_matches('.').contains('.');
            if word.ends_with(['.', '!', '?']) && !is_abbreviation {
                return &line[..at];
            }
            word_at = at + char.len_utf8();
        }
    }
    line
}

fn brief_schema(schema: Value) -> Value {
    let Value::Object(map) = schema else {
        return schema;
    };
    let is_kept = |key: &str| KEPT.contains(&key) || key == "definitions";
    let kept = map.into_iter().filter(|(key, _)| is_kept(key));
    let brief = kept.map(|(key, value)| {
        let value = match (key.as_str(), value) {
            ("properties" | "$defs" | "definitions", Value::Object(named)) => {
                Value::Object(each(named))
            }
            ("items" | "prefixItems" | "anyOf" | "oneOf" | "allOf", Value::Array(list)) => {
                Value::Array(list.into_iter().map(brief_schema).collect())
            }
            ("items", schema) => brief_schema(schema),
            // What stands here is data.
            (_, value) => value,
        };
        (key, value)
    });
    Value::Object(brief.collect())
}

fn each(named: Map<String, Value>) -> Map<String, Value> {
    let brief = named
        .into_iter()
        .map(|(name, schema)| (name, brief_schema(schema)));
    brief.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_description_is_its_first_sentence() {
        let cases = [
            ("Click. Then wait.", "Click."),
            ("Perform click on a web page", "Perform click on a web page"),
            (
                "Types text (e.g. a name) in 0.5 s. More.",
                "Types text (e.g. a name) in 0.5 s.",
            ),
            ("Is it there? Tells so", "Is it there?"),
            ("\n  One\nTwo. ", "One"),
            ("Ends here.", "Ends here."),
            ("Ünïcode! é", "Ünïcode!"),
            ("Wait... then go. x", "Wait..."),
            ("", ""),
        ];
        for (text, expected) in cases {
            assert_eq!(first_sentence(text), expected, "{text}");
        }
    }

    #[test]
    fn arguments_keep_name_type_values_and_need() {
        let mut function = FunctionDef {
            name: "t".into(),
            description: "Does it. And more.".into(),
            parameters: json!({
                "$schema": "x", "type": "object", "description": "d", "additionalProperties": false,
                "properties": {
                    "description": {"type": "string", "description": "d", "default": "x", "minLength": 1},
                    "button": {"enum": ["left", "right"], "description": "d", "title": "T"},
                    "fields": {"type": "array", "minItems": 1, "items": {
                        "type": "object", "additionalProperties": false, "required": ["ref"],
                        "properties": {"ref": {"type": "string", "description": "d", "pattern": "e"}}
                    }},
                    "either": {"anyOf": [{"type": "string", "title": "s"}, {"$ref": "#/$defs/n"}, true]},
                    "kind": {"const": {"description": "data"}},
                },
                "required": ["button"],
                "$defs": {"n": {"type": ["integer", "null"], "maximum": 3}}
            }),
        };
        brief(&mut function);
        assert_eq!(
            (function.name.as_str(), function.description.as_str()),
            ("t", "Does it.")
        );
        let expected = json!({
            "type": "object",
            "properties": {
                "description": {"type": "string"},
                "button": {"enum": ["left", "right"]},
                "fields": {"type": "array", "items": {
                    "type": "object", "required": ["ref"], "properties": {"ref": {"type": "string"}}
                }},
                "either": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/n"}, true]},
                "kind": {"const": {"description": "data"}},
            },
            "required": ["button"],
            "$defs": {"n": {"type": ["integer", "null"]}}
        });
        assert_eq!(function.parameters.to_string(), expected.to_string());
        brief(&mut function);
        assert_eq!(function.parameters, expected);
    }
}
