//! The schema of a tool's arguments, as it binds a call.
//!
//! To JSON schema an object may have more properties than its schema names, unless the schema says no. A form for answers
//! is taken at that word. Arguments are not: tools name all that they read, hardly one says that there is nothing else,
//! and a call with an invented argument is a call that fails. So the objects of arguments that name properties have those
//! alone, as with vLLM, whose xgrammar reads schemas in its strict mode; `additionalProperties` allows more.

use serde_json::{Value, json};

/// Keywords by which several schemas describe one object: none of them knows all of its properties.
const COMPOSING: [&str; 4] = ["allOf", "if", "dependentSchemas", "dependencies"];
/// Those that do so beside `properties`.
const COMPOSING_BESIDE_PROPERTIES: [&str; 3] = ["anyOf", "oneOf", "$ref"];

/// What the arguments of a call must be.
pub(super) fn bound(arguments: &Value) -> Value {
    let mut schema = match arguments {
        Value::Object(_) => arguments.clone(),
        _ => json!({}),
    };
    // Arguments are an object also where the schema forgets to say so.
    if schema.get("type").is_none() {
        schema["type"] = json!("object");
    }
    if !is_composed(&schema) {
        close(&mut schema);
    }
    schema
}

/// Whether an object in it may be described by several schemas. A property that is called like one of the keywords counts
/// too: then nothing is closed, which is never wrong.
fn is_composed(schema: &Value) -> bool {
    match schema {
        Value::Object(map) => {
            let has = |keyword: &&str| map.contains_key(*keyword);
            COMPOSING.iter().any(has)
                || map.contains_key("properties") && COMPOSING_BESIDE_PROPERTIES.iter().any(has)
                || map.values().any(is_composed)
        }
        Value::Array(list) => list.iter().any(is_composed),
        _ => false,
    }
}

/// Closes objects that name properties and do not say whether there are others.
fn close(schema: &mut Value) {
    let map = match schema {
        Value::Object(map) => map,
        Value::Array(list) => return list.iter_mut().for_each(close),
        _ => return,
    };
    let says = ["additionalProperties", "unevaluatedProperties"];
    if map.contains_key("properties") && !says.iter().any(|key| map.contains_key(*key)) {
        map.insert("additionalProperties".to_owned(), json!(false));
    }
    for (keyword, value) in map {
        match (&**keyword, value) {
            (
                "properties" | "patternProperties" | "$defs" | "definitions",
                Value::Object(named),
            ) => {
                named.values_mut().for_each(close);
            }
            ("items" | "prefixItems" | "additionalProperties" | "anyOf" | "oneOf", inner) => {
                close(inner)
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_that_name_properties_have_no_others() {
        let schema = json!({
            "properties": {
                "properties": {"type": "object"},
                "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
                "one": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
                "open": {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}},
            },
            "$defs": {"point": {"type": "object", "properties": {"x": {"const": {"properties": 1}}}}},
        });
        let mut expected = schema.clone();
        expected["type"] = json!("object");
        for place in ["", "/properties/list/items", "/$defs/point"] {
            expected.pointer_mut(place).unwrap()["additionalProperties"] = json!(false);
        }
        assert_eq!(bound(&schema), expected);
    }

    #[test]
    fn schemas_of_several_parts_and_free_objects_stay_as_they_are() {
        let part = json!({"properties": {"a": {"type": "string"}}});
        for schema in [
            json!({"type": "object"}),
            json!({"type": "object", "allOf": [part, part]}),
            json!({"type": "object", "properties": {"b": {}}, "anyOf": [part, part]}),
            json!({"type": "object", "properties": {"b": {"properties": {"c": {}}, "$ref": "#/$defs/d"}}}),
            json!({"type": "object", "properties": {"b": {}}, "additionalProperties": true}),
        ] {
            assert_eq!(bound(&schema), schema);
        }
        assert_eq!(bound(&json!(true)), json!({"type": "object"}));
    }
}
