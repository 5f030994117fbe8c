//! JSON Schema, as far as RunPod's description uses it. A keyword that is not known here is refused aloud: a rule that is
//! passed over in silence would let through what RunPod does not.

use std::collections::BTreeSet;

use regex::Regex;
use serde_json::{Map, Value};

/// Schemas that refer to each other by name.
#[derive(Debug)]
pub struct Schemas(Value);

/// What stands beside rules and is none.
const NO_RULES: [&str; 8] = [
    "then",
    "$schema",
    "description",
    "examples",
    "example",
    "x-enum-varnames",
    "format",
    "default",
];

impl Schemas {
    /// Of the description `openapi`.
    pub fn of(openapi: &Value) -> Self {
        Self(openapi["components"]["schemas"].clone())
    }

    /// Every rule that `value` breaks, with its place, as RunPod words it.
    pub fn faults(&self, schema: &Value, value: &Value) -> Vec<String> {
        let mut visit = Visit {
            schemas: self,
            faults: Vec::new(),
        };
        visit.value(schema, value, "$");
        visit.faults
    }

    fn named(&self, reference: &str) -> &Value {
        let name = reference.strip_prefix("#/components/schemas/");
        let found = name.and_then(|name| self.0.get(name));
        found.unwrap_or_else(|| panic!("the description has no {reference}"))
    }

    fn is_met(&self, schema: &Value, value: &Value) -> bool {
        self.faults(schema, value).is_empty()
    }
}

struct Visit<'a> {
    schemas: &'a Schemas,
    faults: Vec<String>,
}

/// The properties of an object that some rule has looked at.
type Seen = BTreeSet<String>;

impl Visit<'_> {
    fn value(&mut self, schema: &Value, value: &Value, at: &str) -> Seen {
        let rules = schema.as_object().expect("a schema is an object");
        let mut seen = Seen::new();
        for (keyword, rule) in rules {
            match keyword.as_str() {
                "unevaluatedProperties" => {}
                "additionalProperties" => seen.append(&mut self.others(rules, rule, value, at)),
                _ => seen.append(&mut self.rule(keyword, rule, rules, value, at)),
            }
        }
        if rules.get("unevaluatedProperties") == Some(&Value::Bool(false)) {
            self.no_others(value, &seen, at);
        }
        seen
    }

    fn rule(
        &mut self,
        keyword: &str,
        rule: &Value,
        rules: &Map<String, Value>,
        value: &Value,
        at: &str,
    ) -> Seen {
        let schemas = self.schemas;
        match keyword {
            "$ref" => return self.value(schemas.named(text(rule)), value, at),
            "allOf" => {
                let all = list(rule).iter();
                return all.flat_map(|one| self.value(one, value, at)).collect();
            }
            "anyOf" => {
                let met = list(rule).iter().find(|one| schemas.is_met(one, value));
                match met {
                    Some(one) => return self.value(one, value, at),
                    None => self.fault(at, "fits none of what is possible"),
                }
            }
            "if" if schemas.is_met(rule, value) => {
                let mut seen = self.value(rule, value, at);
                if let Some(then) = rules.get("then") {
                    seen.append(&mut self.value(then, value, at));
                }
                return seen;
            }
            "if" => {}
            "not" if schemas.is_met(rule, value) => self.fault(at, "is what it must not be"),
            "not" => {}
            "properties" => return self.properties(rule, value, at),
            "items" => {
                for (n, item) in value.as_array().into_iter().flatten().enumerate() {
                    self.value(rule, item, &format!("{at}[{n}]"));
                }
            }
            other if NO_RULES.contains(&other) => {}
            other => self.plain(other, rule, value, at),
        }
        Seen::new()
    }

    /// Rules over the value itself.
    fn plain(&mut self, keyword: &str, rule: &Value, value: &Value, at: &str) {
        let length = value.as_str().map(|text| text.chars().count() as u64);
        let items = value.as_array().map(|items| items.len() as u64);
        let least = rule.as_u64();
        let fault = match keyword {
            "type" => (!is_of(rule, value)).then(|| format!("must be of type {rule}")),
            "enum" => (!list(rule).contains(value)).then(|| format!("must be one of {rule}")),
            "required" => self.required(rule, value),
            "minLength" => (length < least && length.is_some())
                .then(|| format!("must have at least {rule} characters")),
            "maxItems" => (items > least && items.is_some())
                .then(|| format!("must have at most {rule} items")),
            "minimum" => {
                let below = value.as_f64().zip(rule.as_f64()).filter(|(v, r)| v < r);
                below.map(|_| format!("must be at least {rule}"))
            }
            "pattern" => {
                let pattern = Regex::new(text(rule)).expect("a pattern");
                let other = value.as_str().filter(|text| !pattern.is_match(text));
                other.map(|_| format!("must match {rule}"))
            }
            other => panic!("the keyword `{other}` is not known to this server: teach it"),
        };
        if let Some(fault) = fault {
            self.fault(at, &fault);
        }
    }

    fn required(&self, rule: &Value, value: &Value) -> Option<String> {
        let object = value.as_object()?;
        let missing = list(rule).iter().map(text);
        let missing: Vec<&str> = missing.filter(|name| !object.contains_key(*name)).collect();
        (!missing.is_empty()).then(|| format!("missing properties '{}'", missing.join("', '")))
    }

    fn properties(&mut self, rule: &Value, value: &Value, at: &str) -> Seen {
        let Some(object) = value.as_object() else {
            return Seen::new();
        };
        let known = object.iter().filter_map(|(name, value)| {
            let schema = rule.get(name)?;
            Some((name, schema, value))
        });
        known
            .map(|(name, schema, value)| {
                self.value(schema, value, &format!("{at}.{name}"));
                name.clone()
            })
            .collect()
    }

    /// What `properties` beside this rule does not name.
    fn others(
        &mut self,
        rules: &Map<String, Value>,
        rule: &Value,
        value: &Value,
        at: &str,
    ) -> Seen {
        let known = |name: &str| {
            let properties = rules.get("properties");
            properties.is_some_and(|known| known.get(name).is_some())
        };
        let others = value.as_object().into_iter().flatten();
        let others: Vec<_> = others.filter(|(name, _)| !known(name)).collect();
        for (name, value) in &others {
            match rule {
                Value::Bool(true) => {}
                Value::Bool(false) => self.fault(at, &not_allowed(name)),
                schema => {
                    self.value(schema, value, &format!("{at}.{name}"));
                }
            }
        }
        others.into_iter().map(|(name, _)| name.clone()).collect()
    }

    fn no_others(&mut self, value: &Value, seen: &Seen, at: &str) {
        let names = value.as_object().into_iter().flatten();
        let others = names.filter(|(name, _)| !seen.contains(*name));
        let faults: Vec<String> = others.map(|(name, _)| not_allowed(name)).collect();
        for fault in faults {
            self.fault(at, &fault);
        }
    }

    fn fault(&mut self, at: &str, rule: &str) {
        self.faults.push(format!("{at}: {rule}"));
    }
}

fn not_allowed(name: &str) -> String {
    format!("additional properties '{name}' not allowed")
}

fn text(rule: &Value) -> &str {
    rule.as_str().expect("a text")
}

fn list(rule: &Value) -> &[Value] {
    rule.as_array().expect("a list")
}

/// Whether a value is of a type, or of one of several.
fn is_of(rule: &Value, value: &Value) -> bool {
    let one = |name: &str| match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        other => panic!("the type `{other}` is not known to this server: teach it"),
    };
    match rule {
        Value::Array(names) => names.iter().any(|name| one(text(name))),
        name => one(text(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn faults(schema: Value, value: Value) -> Vec<String> {
        let named = json!({"components": {"schemas": {
            "Base": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}},
        }}});
        Schemas::of(&named).faults(&schema, &value)
    }

    #[test]
    fn what_no_part_of_a_whole_names_is_refused() {
        let schema = json!({
            "allOf": [
                {"$ref": "#/components/schemas/Base"},
                {"type": "object", "required": ["b"], "properties": {"b": {"enum": ["x", "y"]}}},
            ],
            "unevaluatedProperties": false,
            "if": {"not": {"required": ["t"]}},
            "then": {"required": ["a"]},
        });
        let ok = faults(schema.clone(), json!({"a": 1, "b": "x"}));
        assert!(ok.is_empty(), "{ok:?}");
        for (value, fault) in [
            (
                json!({"a": 1, "b": "x", "c": 1}),
                "$: additional properties 'c' not allowed",
            ),
            (json!({"a": 0, "b": "x"}), "$.a: must be at least 1"),
            (
                json!({"a": 1.5, "b": "x"}),
                "$.a: must be of type \"integer\"",
            ),
            (json!({"a": 1}), "$: missing properties 'b'"),
            (json!({"b": "x"}), "$: missing properties 'a'"),
            (
                json!({"a": 1, "b": "z"}),
                "$.b: must be one of [\"x\",\"y\"]",
            ),
            (json!([]), "$: must be of type \"object\""),
        ] {
            let found = faults(schema.clone(), value.clone());
            assert!(found.contains(&fault.to_owned()), "{value}: {found:?}");
        }
        let with = faults(schema, json!({"b": "x", "t": 1}));
        assert_eq!(with, ["$: additional properties 't' not allowed"]);
    }

    #[test]
    fn values_keep_their_bounds() {
        let schema = json!({"type": "object", "additionalProperties": {"type": ["string", "null"], "minLength": 2}});
        assert!(faults(schema.clone(), json!({"x": "ab", "y": null})).is_empty());
        assert_eq!(faults(schema.clone(), json!({"x": "a"})).len(), 1);
        assert_eq!(faults(schema, json!({"x": 1})).len(), 1);
        let list = json!({"type": "array", "maxItems": 1, "items": {"type": "string", "pattern": "^\\d+$"}});
        assert!(faults(list.clone(), json!(["12"])).is_empty());
        assert_eq!(faults(list.clone(), json!(["1", "2"])).len(), 1);
        assert_eq!(
            faults(list, json!(["x"])),
            ["$[0]: must match \"^\\\\d+$\""]
        );
        let any =
            json!({"anyOf": [{"type": "null"}, {"type": "object", "additionalProperties": false}]});
        assert!(faults(any.clone(), json!({})).is_empty());
        assert_eq!(faults(any, json!({"x": 1})).len(), 1);
    }

    #[test]
    #[should_panic(expected = "the keyword `maximum` is not known")]
    fn a_rule_that_is_not_known_is_said() {
        faults(json!({"maximum": 3}), json!(1));
    }
}
