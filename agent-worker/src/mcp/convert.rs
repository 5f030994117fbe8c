//! MCP tools as OpenAI tools, and the way back. Pure.
//!
//! The limits are those of the workshop: names of at most 64 of `[A-Za-z0-9_-]`, descriptions of at most 1024
//! characters, an object at the root of each schema, no string formats beyond the few that model servers know.

use std::collections::{BTreeMap, BTreeSet};

use espalier_core::chat::{FunctionDef, FunctionTag, ToolDef};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// Longest offered name, in characters.
const NAME_CHARS_MAX: usize = 64;
/// Longest description, in characters.
const DESCRIPTION_CHARS_MAX: usize = 1024;
/// Deepest nesting of a schema that is kept; what lies deeper accepts anything. Protects the stack.
const SCHEMA_DEPTH_MAX: usize = 48;
/// Under this name stands an argument object that the tool wants to be something else.
const WRAPPED_KEY: &str = "value";
/// The string formats of OpenAI's structured outputs.
const STRING_FORMATS: &[&str] = &[
    "date",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "time",
    "uuid",
];

/// A tool as its server lists it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RawTool {
    /// Name of the server.
    pub server: String,
    /// The server's own name for the tool.
    pub name: String,
    /// The server's description.
    pub description: String,
    /// The server's schema of the arguments.
    pub schema: Map<String, Value>,
}

/// A tool as the model is offered it, with the way back to its server.
#[derive(Clone, Debug, PartialEq)]
pub struct OfferedTool {
    /// What the model sees.
    pub def: ToolDef,
    /// Name of the server.
    pub server: String,
    /// The server's own name for the tool.
    pub raw_name: String,
    /// Whether a call waits for an answer.
    pub needs_approval: bool,
    /// Whether the schema was wrapped, so that a call has to be unwrapped.
    pub(super) wrapped: bool,
}

impl OfferedTool {
    /// The name that the model calls.
    pub fn name(&self) -> &str {
        &self.def.function.name
    }

    /// The model's arguments as the server wants them. MCP has only objects on the wire, so a wrapped value that is no
    /// object stays under its key.
    pub(super) fn raw_arguments(&self, mut arguments: Map<String, Value>) -> Map<String, Value> {
        if !self.wrapped {
            return arguments;
        }
        match arguments.remove(WRAPPED_KEY) {
            Some(Value::Object(inner)) if arguments.is_empty() => inner,
            Some(other) => {
                arguments.insert(WRAPPED_KEY.to_owned(), other);
                arguments
            }
            None => arguments,
        }
    }
}

/// Converts the tools of all servers of a rollout. Names depend only on the list, not on its history. A tool that its
/// server lists twice is offered once, since a call could only reach one of them.
pub(super) fn convert(mut tools: Vec<RawTool>) -> Vec<OfferedTool> {
    let mut listed = BTreeSet::new();
    tools.retain(|tool| listed.insert((tool.server.clone(), tool.name.clone())));
    let names = offered_names(&tools);
    let offered = |(tool, name): (RawTool, String)| {
        let (parameters, wrapped) = parameters(tool.schema);
        let function = FunctionDef {
            name,
            description: tool
                .description
                .chars()
                .take(DESCRIPTION_CHARS_MAX)
                .collect(),
            parameters,
        };
        OfferedTool {
            def: ToolDef {
                tool_type: FunctionTag::Function,
                function,
            },
            server: tool.server,
            raw_name: tool.name,
            needs_approval: false,
            wrapped,
        }
    };
    tools.into_iter().zip(names).map(offered).collect()
}

/// A name for each tool: its own where that is free, else `server__tool`, else the same with a digest at its end.
fn offered_names(tools: &[RawTool]) -> Vec<String> {
    let plain: Vec<String> = tools.iter().map(|tool| clean(&tool.name)).collect();
    let prefixed: Vec<String> = tools
        .iter()
        .map(|tool| clean(&format!("{}__{}", tool.server, tool.name)))
        .collect();
    let mut names: Vec<Option<String>> = vec![None; tools.len()];
    let mut taken = BTreeSet::new();
    for candidates in [&plain, &prefixed] {
        let mut count = BTreeMap::new();
        for (candidate, name) in candidates.iter().zip(&names) {
            if name.is_none() {
                *count.entry(candidate.as_str()).or_insert(0u32) += 1;
            }
        }
        for (name, candidate) in names.iter_mut().zip(candidates) {
            let free = candidate.len() <= NAME_CHARS_MAX && !taken.contains(candidate);
            if name.is_none() && free && count[candidate.as_str()] == 1 {
                *name = Some(candidate.clone());
            }
        }
        taken.extend(names.iter().flatten().cloned());
    }
    let digested = |((name, tool), prefixed): ((Option<String>, &RawTool), String)| {
        name.unwrap_or_else(|| {
            // A server may call a tool of its own by what another's would be called.
            let mut tries = (0..).map(|n| with_digest(&prefixed, tool, n));
            let free = tries.find(|name| taken.insert(name.clone()));
            free.unwrap_or(prefixed)
        })
    };
    names
        .into_iter()
        .zip(tools)
        .zip(prefixed)
        .map(digested)
        .collect()
}

fn clean(name: &str) -> String {
    let keep = |c: char| {
        if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') {
            c
        } else {
            '_'
        }
    };
    let name: String = name.chars().map(keep).collect();
    if name.is_empty() {
        "_".to_owned()
    } else {
        name
    }
}

/// `n` tells the tries apart.
fn with_digest(prefixed: &str, tool: &RawTool, n: u32) -> String {
    let tried = if n == 0 {
        String::new()
    } else {
        format!("\0{n}")
    };
    let digest = Sha256::digest(format!("{}\0{}{tried}", tool.server, tool.name));
    let suffix: String = digest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let head: String = prefixed
        .chars()
        .take(NAME_CHARS_MAX - 1 - suffix.len())
        .collect();
    format!("{head}_{suffix}")
}

/// The schema with an object at its root, and whether it was wrapped for that.
fn parameters(schema: Map<String, Value>) -> (Value, bool) {
    let has_properties = schema.contains_key("properties");
    let is_object = match schema.get("type") {
        Some(Value::String(kind)) => kind == "object",
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "object"),
        _ => has_properties || schema.is_empty(),
    };
    let Value::Object(mut root) = clean_schema(Value::Object(schema), 0) else {
        return (json!({"type": "object", "properties": {}}), false);
    };
    root.shift_remove("$schema");
    if is_object {
        root.insert("type".to_owned(), "object".into());
        root.entry("properties").or_insert_with(|| json!({}));
        return (Value::Object(root), false);
    }
    // References are paths from the root: definitions stay there, while the tool's own root is one step down.
    let definitions = ["$defs", "definitions"].map(|key| (key, root.shift_remove(key)));
    let mut value = Value::Object(root);
    let mut wrapper = Map::new();
    wrapper.insert("type".to_owned(), "object".into());
    move_root_references(&mut value);
    wrapper.insert("properties".to_owned(), json!({ WRAPPED_KEY: value }));
    wrapper.insert("required".to_owned(), json!([WRAPPED_KEY]));
    for (key, mut definition) in definitions.into_iter().filter_map(|(k, d)| Some((k, d?))) {
        move_root_references(&mut definition);
        wrapper.insert(key.to_owned(), definition);
    }
    (Value::Object(wrapper), true)
}

fn move_root_references(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if let Some(reference) = map.get_mut("$ref").filter(|reference| *reference == "#") {
                *reference = format!("#/properties/{WRAPPED_KEY}").into();
            }
            map.values_mut().for_each(move_root_references);
        }
        Value::Array(items) => items.iter_mut().for_each(move_root_references),
        _ => {}
    }
}

/// Removes unknown string formats wherever a schema stands, and only there: a property that is called `format` and the
/// content of `default`, `enum`, `const` and `examples` are data.
fn clean_schema(schema: Value, depth: usize) -> Value {
    if depth > SCHEMA_DEPTH_MAX {
        return Value::Bool(true);
    }
    let Value::Object(mut map) = schema else {
        return schema;
    };
    let is_unknown = |format: &Value| {
        format
            .as_str()
            .is_none_or(|format| !STRING_FORMATS.contains(&format))
    };
    if may_be_string(&map) && map.get("format").is_some_and(is_unknown) {
        map.shift_remove("format");
    }
    for (key, value) in &mut map {
        let inner = std::mem::take(value);
        *value = match key.as_str() {
            "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas" => {
                each_value(inner, depth)
            }
            "anyOf" | "oneOf" | "allOf" | "prefixItems" => each_item(inner, depth),
            "items" if inner.is_array() => each_item(inner, depth),
            "items"
            | "additionalProperties"
            | "unevaluatedProperties"
            | "unevaluatedItems"
            | "not"
            | "if"
            | "then"
            | "else"
            | "contains"
            | "propertyNames" => clean_schema(inner, depth + 1),
            _ => inner,
        };
    }
    Value::Object(map)
}

fn may_be_string(schema: &Map<String, Value>) -> bool {
    match schema.get("type") {
        Some(Value::String(kind)) => kind == "string",
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "string"),
        _ => true,
    }
}

fn each_value(value: Value, depth: usize) -> Value {
    match value {
        Value::Object(map) => {
            let clean = |(key, schema)| (key, clean_schema(schema, depth + 1));
            Value::Object(map.into_iter().map(clean).collect())
        }
        other => other,
    }
}

fn each_item(value: Value, depth: usize) -> Value {
    match value {
        Value::Array(items) => {
            let clean = |schema| clean_schema(schema, depth + 1);
            Value::Array(items.into_iter().map(clean).collect())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(server: &str, name: &str, schema: Value) -> RawTool {
        let Value::Object(schema) = schema else {
            panic!("a schema is an object");
        };
        RawTool {
            server: server.into(),
            name: name.into(),
            description: "d".into(),
            schema,
        }
    }

    fn names(tools: &[(&str, &str)]) -> Vec<String> {
        let raw = tools
            .iter()
            .map(|(s, n)| tool(s, n, json!({"type": "object"})))
            .collect();
        convert(raw).iter().map(|t| t.name().to_owned()).collect()
    }

    fn converted(schema: Value) -> (Value, OfferedTool) {
        let offered = convert(vec![tool("s", "t", schema)]).remove(0);
        (offered.def.function.parameters.clone(), offered)
    }

    #[test]
    fn names_stay_where_they_can() {
        assert_eq!(names(&[("a", "open"), ("b", "close")]), ["open", "close"]);
        assert_eq!(names(&[("a", "x.y z")]), ["x_y_z"]);
        assert_eq!(names(&[("a", "é")]), ["_"]);
    }

    #[test]
    fn colliding_names_carry_their_server() {
        let got = names(&[("a", "open"), ("b", "open"), ("b", "close")]);
        assert_eq!(got, ["a__open", "b__open", "close"]);
        // The prefixed name may itself be taken.
        let got = names(&[("a", "open"), ("b", "open"), ("c", "a__open")]);
        assert_eq!(got[1..], ["b__open", "a__open"]);
        assert!(
            got[0].starts_with("a__open_") && got[0].len() == 16,
            "{got:?}"
        );
    }

    #[test]
    fn any_list_gets_distinct_legal_names() {
        let long = "x".repeat(100);
        let longer = format!("{long}y");
        let list = [
            ("a", long.as_str()),
            ("a", &longer),
            ("b", &long),
            ("a b", "t"),
            ("a_b", "t"),
            ("a", "p.q"),
            ("a", "p_q"),
        ];
        let got = names(&list);
        assert_eq!(
            got.iter().collect::<BTreeSet<_>>().len(),
            list.len(),
            "{got:?}"
        );
        for name in &got {
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
            assert!(
                !name.is_empty() && name.len() <= 64 && name.chars().all(legal),
                "{name}"
            );
        }
        assert_eq!(got, names(&list), "the same list gives the same names");
        let mut turned = list;
        turned.reverse();
        let mut back = names(&turned);
        back.reverse();
        assert_eq!(got, back, "order does not matter");
    }

    #[test]
    fn a_tool_that_is_listed_twice_is_offered_once() {
        assert_eq!(names(&[("a", "open"), ("a", "open")]), ["open"]);
    }

    #[test]
    fn no_server_can_take_the_name_of_another_servers_tool() {
        let long = "x".repeat(100);
        let victim = names(&[("a", &long)]).remove(0);
        let got = names(&[("b", &victim), ("a", &long)]);
        assert_eq!(got[0], victim);
        assert_ne!(got[1], victim);
    }

    #[test]
    fn descriptions_are_cut_at_a_character() {
        let mut raw = tool("s", "t", json!({"type": "object"}));
        raw.description = "é".repeat(2000);
        assert_eq!(
            convert(vec![raw])[0].def.function.description,
            "é".repeat(1024)
        );
    }

    #[test]
    fn an_object_root_is_kept() {
        let schema = json!({"$schema": "x", "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]});
        let (parameters, offered) = converted(schema);
        assert_eq!(
            parameters,
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
        );
        let arguments = json!({"value": {"b": 1}}).as_object().cloned().unwrap();
        assert_eq!(offered.raw_arguments(arguments.clone()), arguments);
        for empty in [
            json!({}),
            json!({"type": "object"}),
            json!({"type": ["object", "null"]}),
        ] {
            assert_eq!(
                converted(empty).0,
                json!({"type": "object", "properties": {}})
            );
        }
    }

    #[test]
    fn another_root_is_wrapped_and_unwrapped() {
        let schema = json!({
            "anyOf": [{"type": "object", "properties": {"next": {"$ref": "#"}}}, {"$ref": "#/$defs/b"}],
            "$defs": {"b": {"type": "object", "properties": {"up": {"$ref": "#"}}}}
        });
        let (parameters, offered) = converted(schema);
        assert_eq!(
            parameters,
            json!({
                "type": "object",
                "properties": {"value": {
                    "anyOf": [
                        {"type": "object", "properties": {"next": {"$ref": "#/properties/value"}}},
                        {"$ref": "#/$defs/b"}
                    ]
                }},
                "required": ["value"],
                "$defs": {"b": {"type": "object", "properties": {"up": {"$ref": "#/properties/value"}}}}
            })
        );
        let call = |v: Value| offered.raw_arguments(v.as_object().cloned().unwrap());
        assert_eq!(
            Value::Object(call(json!({"value": {"a": 1}}))),
            json!({"a": 1})
        );
        assert_eq!(
            Value::Object(call(json!({"value": [1]}))),
            json!({"value": [1]})
        );
        assert_eq!(Value::Object(call(json!({"a": 1}))), json!({"a": 1}));
    }

    #[test]
    fn unknown_string_formats_go_everywhere_but_from_data() {
        let schema = json!({
            "type": "object",
            "properties": {
                "format": {"type": "string", "format": "uri", "default": {"format": "uri"}},
                "n": {"type": "integer", "format": "int32"},
                "d": {"type": "string", "format": "date"},
                "u": {"anyOf": [{"type": ["string", "null"], "format": "regex"}, {"$ref": "#/$defs/x"}]},
                "l": {"type": "array", "items": {"format": "binary"}},
                "t": {"type": "array", "items": [{"type": "string", "format": "iri"}]}
            },
            "additionalProperties": {"type": "string", "format": "uri"},
            "$defs": {"x": {"oneOf": [{"allOf": [{"type": "string", "format": "uri-reference"}]}], "enum": [{"format": "uri"}]}}
        });
        assert_eq!(
            converted(schema).0,
            json!({
                "type": "object",
                "properties": {
                    "format": {"type": "string", "default": {"format": "uri"}},
                    "n": {"type": "integer", "format": "int32"},
                    "d": {"type": "string", "format": "date"},
                    "u": {"anyOf": [{"type": ["string", "null"]}, {"$ref": "#/$defs/x"}]},
                    "l": {"type": "array", "items": {}},
                    "t": {"type": "array", "items": [{"type": "string"}]}
                },
                "additionalProperties": {"type": "string"},
                "$defs": {"x": {"oneOf": [{"allOf": [{"type": "string"}]}], "enum": [{"format": "uri"}]}}
            })
        );
    }

    #[test]
    fn a_bottomless_schema_does_not_end_the_stack() {
        let mut schema = json!({"type": "string", "format": "uri"});
        for _ in 0..5000 {
            let mut outer = Map::new();
            outer.insert("not".to_owned(), schema);
            schema = Value::Object(outer);
        }
        let mut root = Map::new();
        root.insert("properties".to_owned(), json!({}));
        root.insert("not".to_owned(), schema);
        let raw = RawTool {
            server: "s".into(),
            name: "t".into(),
            description: String::new(),
            schema: root,
        };
        // On a thread with room to drop what the test built.
        let depth = std::thread::Builder::new()
            .stack_size(64 << 20)
            .spawn(move || {
                let offered = convert(vec![raw]);
                let mut depth = 0;
                let mut at = &offered[0].def.function.parameters;
                while let Some(next) = at.get("not") {
                    (at, depth) = (next, depth + 1);
                }
                depth
            });
        assert!(depth.unwrap().join().unwrap() <= SCHEMA_DEPTH_MAX + 1);
    }
}
