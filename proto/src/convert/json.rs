//! `google.protobuf.Value` and `serde_json::Value`.

use prost_types::value::Kind;
use serde_json::{Map, Number, Value};

/// JSON has no infinity and protobuf has: such a number becomes null.
pub fn from_wire(value: &prost_types::Value) -> Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(b)) => Value::Bool(*b),
        Some(Kind::NumberValue(n)) => number(*n),
        Some(Kind::StringValue(s)) => Value::String(s.clone()),
        Some(Kind::ListValue(list)) => Value::Array(list.values.iter().map(from_wire).collect()),
        Some(Kind::StructValue(object)) => Value::Object(map_from_wire(object)),
    }
}

/// The wire knows only doubles: a whole number comes back as the integer that it was.
fn number(n: f64) -> Value {
    // 2^53: up to here every whole double is exact.
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    if n.fract() == 0.0 && n.abs() <= EXACT_MAX {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "whole and within 2^53, as just checked"
        )]
        return Value::from(n as i64);
    }
    Number::from_f64(n).map_or(Value::Null, Value::Number)
}

pub fn map_from_wire(object: &prost_types::Struct) -> Map<String, Value> {
    object
        .fields
        .iter()
        .map(|(name, value)| (name.clone(), from_wire(value)))
        .collect()
}

pub fn to_wire(value: &Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(b) => Kind::BoolValue(*b),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        Value::String(s) => Kind::StringValue(s.clone()),
        Value::Array(list) => Kind::ListValue(prost_types::ListValue {
            values: list.iter().map(to_wire).collect(),
        }),
        Value::Object(map) => Kind::StructValue(map_to_wire(map)),
    };
    prost_types::Value { kind: Some(kind) }
}

pub fn map_to_wire(map: &Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct {
        fields: map
            .iter()
            .map(|(name, value)| (name.clone(), to_wire(value)))
            .collect(),
    }
}
