//! What compiling a schema may cost, told from its text.
//!
//! llguidance joins what stands beside alternatives with each of them, and copies it each time; its own bound counts these
//! joins, not their bytes. So a schema of a few kilobytes can ask for gigabytes: a long constant beside ten thousand
//! alternatives. Here the bytes are counted before anything is compiled. Where that cannot be told exactly, it is
//! counted too high, but never for what schemas of tools are made of: alternatives with little beside them, and `null` as
//! one of two.

use serde_json::{Map, Value};

/// What a key takes beside its name.
const KEY_BYTES: u64 = 32;
/// Most joins that llguidance makes in one schema.
const JOINS_MAX: u64 = 50_000;

/// Keywords that say nothing about what is allowed, or whose content stands elsewhere.
const APART: [&str; 10] = [
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "default",
    "definitions",
    "description",
    "examples",
    "title",
    "x-guidance",
];
/// Keywords with a list of alternatives.
const ALTERNATIVES: [&str; 4] = ["anyOf", "enum", "oneOf", "type"];

/// An upper bound for the bytes that are copied when the schema is compiled.
pub(super) fn copied_bytes(schema: &Value) -> u64 {
    of_part(schema, &All::of(schema))
}

/// What is known of a whole part.
struct All {
    bytes: u64,
    joins: u64,
    refers: bool,
}

impl All {
    fn of(value: &Value) -> Self {
        let mut all = Self {
            bytes: 0,
            joins: 1,
            refers: false,
        };
        all.add(value);
        all
    }

    fn add(&mut self, value: &Value) {
        match value {
            Value::Object(map) => {
                self.refers |= map.get("$ref").is_some_and(Value::is_string);
                self.join(alternatives(map).map(count).product());
                // Properties that one part names are joined with what another one says of all.
                self.join(map.get("properties").map_or(1, names));
                self.join(map.get("prefixItems").map_or(1, count));
                for (key, value) in map {
                    self.bytes += key.len() as u64 + KEY_BYTES;
                    if !is_annotation(key, value) {
                        self.add(value);
                    }
                }
            }
            Value::Array(list) => {
                self.bytes += list.len() as u64;
                list.iter().for_each(|item| self.add(item));
            }
            Value::String(text) => self.bytes += text.len() as u64 + 2,
            _ => self.bytes += 8,
        }
    }

    fn join(&mut self, with: u64) {
        self.joins = self.joins.saturating_mul(with).min(JOINS_MAX);
    }
}

/// `whole` is what references may lead to.
fn of_part(value: &Value, whole: &All) -> u64 {
    let map = match value {
        Value::Object(map) => map,
        Value::Array(list) => return list.iter().map(|item| of_part(item, whole)).sum(),
        _ => return 0,
    };
    let below = map.iter().filter(|(key, value)| !is_annotation(key, value));
    let below: u64 = below.map(|(_, value)| of_part(value, whole)).sum();
    below.saturating_add(of_object(map, whole))
}

fn of_object(map: &Map<String, Value>, whole: &All) -> u64 {
    let mut own = map.clone();
    own.retain(|key, _| !APART.contains(&&**key));
    if joins_parts(&own) {
        let all = All::of(&Value::Object(own));
        let all = if all.refers { whole } else { &all };
        return all.joins.saturating_mul(all.bytes);
    }
    let joins: u64 = alternatives(&own).map(count).product();
    if alternatives(&own).count() == 1 {
        own.retain(|key, value| !(ALTERNATIVES.contains(&&**key) && value.is_array()));
    }
    joins.saturating_mul(All::of(&Value::Object(own)).bytes)
}

/// Whether several parts describe one value, so that what is within them is joined too.
fn joins_parts(own: &Map<String, Value>) -> bool {
    let parts = own
        .get("allOf")
        .and_then(Value::as_array)
        .map_or(0, Vec::len) as u64;
    let refers = u64::from(own.get("$ref").is_some_and(Value::is_string));
    let patterns = own.contains_key("patternProperties") && own.contains_key("properties");
    parts > 1 || patterns || parts + refers > 0 && own.len() > 1
}

fn alternatives(map: &Map<String, Value>) -> impl Iterator<Item = &Value> {
    let lists = ALTERNATIVES.iter().filter_map(|keyword| map.get(*keyword));
    lists.filter(|list| list.is_array())
}

/// Alternatives beside `null`: joined with others, that one comes to nothing.
fn count(list: &Value) -> u64 {
    let items = list.as_array().map_or(&[][..], Vec::as_slice);
    let is_null = |item: &&Value| item.is_null() || *item == "null" || item["type"] == "null";
    items.iter().filter(|item| !is_null(item)).count().max(1) as u64
}

fn names(properties: &Value) -> u64 {
    properties.as_object().map_or(1, |map| map.len().max(1)) as u64
}

/// A schema of that name is a property's.
fn is_annotation(key: &str, value: &Value) -> bool {
    APART.contains(&key) && !value.is_object()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_tools_are_made_of_is_cheap() {
        let nullable: Map<String, Value> = (0..40)
            .map(|i| {
                let schema = json!({"anyOf": [{"type": "string"}, {"type": "null"}], "default": null,
                    "description": "d".repeat(500)});
                (format!("property_{i}"), schema)
            })
            .collect();
        let words: Vec<String> = (0..500).map(|i| format!("word number {i}")).collect();
        for schema in [
            json!({"type": "object", "properties": nullable}),
            json!({"type": "object", "properties": {"a": {"type": "string", "enum": words}, "b": {"properties": nullable}}}),
            json!({"properties": {"a": {"allOf": [{"$ref": "#/$defs/a"}], "description": "x".repeat(9000)}},
                "$defs": {"a": {"type": "object", "properties": nullable}}}),
            json!({"allOf": [{"properties": {"a": {"type": ["string", "null"]}}}, {"properties": {"b": {"enum": [1, 2, 3]}}}]}),
        ] {
            let bytes = copied_bytes(&schema);
            assert!(bytes < MIB / 4, "{bytes}");
        }
    }

    #[test]
    fn copies_are_counted_wherever_they_come_from() {
        let long = json!({"const": "x".repeat(20_000)});
        let many = |count: usize| vec![json!({"type": "object"}); count];
        let named: Map<String, Value> = (0..1000).map(|i| (format!("p{i}"), json!({}))).collect();
        for schema in [
            json!({"properties": {"a": long}, "anyOf": many(1000)}),
            json!({"properties": named, "anyOf": many(1000)}),
            json!({"properties": {"a": {"properties": {"b": long}, "oneOf": many(1000)}}}),
            json!({"properties": {"a": long}, "anyOf": many(40), "oneOf": many(40)}),
            json!({"properties": {"a": long}, "enum": (0..1000).collect::<Vec<_>>()}),
            json!({"allOf": [long, {"anyOf": many(1000)}]}),
            json!({"allOf": [{"properties": {"a": long}}, {"properties": {"a": {"anyOf": many(1000)}}}]}),
            json!({"$ref": "#/$defs/a", "anyOf": many(1000), "$defs": {"a": long}}),
            json!({"$ref": "#/$defs/a", "type": "object", "$defs": {"a": {"$ref": "#/$defs/b", "anyOf": many(1000)}, "b": long}}),
            json!({"properties": named, "patternProperties": {"^p": long}}),
            json!({"properties": {"title": long}, "anyOf": many(1000)}),
            json!({"allOf": vec![json!({"properties": {"a": {"anyOf": many(2)}, "b": long}}); 12]}),
        ] {
            let bytes = copied_bytes(&schema);
            assert!(bytes > 10 * MIB, "{bytes}: {:.300}", schema.to_string());
        }
    }
}
