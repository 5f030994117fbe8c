//! The form that a request asks of an answer's text, under each of the names that such a wish goes by.

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// A schema that the text must follow.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Format {
    pub(super) schema: Value,
    /// The field that asked for it.
    pub(super) field: &'static str,
}

/// Takes all fields that may ask for a form.
pub(super) fn take(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let asked = [
        ("response_format", response_format(fields)?),
        ("structured_outputs", structured_outputs(fields)?),
        ("guided_json", guided_json(fields)?),
    ];
    let format = |(field, schema): (_, Option<Value>)| Some((field, schema?));
    let mut asked = asked.into_iter().filter_map(format);
    match (asked.next(), asked.next()) {
        (Some((one, _)), Some((other, _))) => {
            let message = format!("`{other}` must not be given beside `{one}`");
            Err(ApiError::about(other, message))
        }
        (first, _) => Ok(first.map(|(field, schema)| Format { schema, field })),
    }
}

fn response_format(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else {
        return Ok(None);
    };
    let at = format.path("type");
    match format.text("type")?.as_deref() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(any_object())),
        Some("json_schema") => {
            let at = format.path("json_schema");
            let inner = format.object("json_schema")?;
            let mut inner = inner.ok_or_else(|| {
                ApiError::field(&at, "must be an object with `schema`", &Value::Null)
            })?;
            let at = inner.path("schema");
            schema(inner.take("schema").unwrap_or_default(), &at).map(Some)
        }
        other => Err(ApiError::field(
            at,
            "must be text, json_object or json_schema",
            &json!(other),
        )),
    }
}

/// vLLM's: one of several kinds, of which JSON is served.
fn structured_outputs(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let Some(mut asked) = fields.object("structured_outputs")? else {
        return Ok(None);
    };
    let at = asked.path("json");
    let of_schema = asked.take("json").map(|given| given_schema(given, &at));
    let of_any = asked.flag("json_object")?.unwrap_or(false);
    let prefix = asked.path("");
    for (name, value) in asked.into_rest() {
        if !value.is_null() && value != json!(false) {
            let rule = "is not served; only `json` and `json_object` are";
            return Err(ApiError::field(format!("{prefix}{name}"), rule, &value));
        }
    }
    match of_schema {
        Some(schema) => schema.map(Some),
        None => Ok(of_any.then(any_object)),
    }
}

/// vLLM's older name.
fn guided_json(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let given = fields.take("guided_json");
    given
        .map(|given| given_schema(given, "guided_json"))
        .transpose()
}

fn any_object() -> Value {
    json!({"type": "object"})
}

/// vLLM takes a schema also as its text.
fn given_schema(given: Value, at: &str) -> Result<Value, ApiError> {
    let parsed = match &given {
        Value::String(text) => serde_json::from_str(text).ok(),
        _ => None,
    };
    schema(parsed.unwrap_or(given), at)
}

fn schema(given: Value, at: &str) -> Result<Value, ApiError> {
    match given {
        schema @ (Value::Object(_) | Value::Bool(true)) => Ok(schema),
        other => Err(ApiError::field(at, "must be a JSON schema", &other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &Value) -> Result<Option<Format>, ApiError> {
        let mut fields = Fields::parse(body.to_string().as_bytes())?;
        let format = take(&mut fields)?;
        assert_eq!(fields.ignored(), "", "{body}");
        Ok(format)
    }

    #[test]
    fn every_name_of_a_form_is_read() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let object = json!({"type": "object"});
        let response_format = |format: Value| json!({"response_format": format});
        let named = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        for (body, expected) in [
            (json!({}), None),
            (response_format(json!({"type": "text"})), None),
            (
                response_format(json!({"type": "json_object"})),
                Some((&object, "response_format")),
            ),
            (response_format(named), Some((&schema, "response_format"))),
            (
                json!({"structured_outputs": {"json": null, "regex": null}}),
                None,
            ),
            (
                json!({"structured_outputs": {"json": schema}}),
                Some((&schema, "structured_outputs")),
            ),
            (
                json!({"structured_outputs": {"json_object": true}}),
                Some((&object, "structured_outputs")),
            ),
            (
                json!({"guided_json": schema}),
                Some((&schema, "guided_json")),
            ),
            (
                json!({"guided_json": schema.to_string()}),
                Some((&schema, "guided_json")),
            ),
        ] {
            let expected = expected.map(|(schema, field)| Format {
                schema: schema.clone(),
                field,
            });
            assert_eq!(read(&body).unwrap(), expected, "{body}");
        }
    }

    #[test]
    fn what_is_no_form_or_not_served_is_refused_by_name() {
        let with_schema = |schema: Value| json!({"type": "json_schema", "json_schema": schema});
        for (body, param) in [
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format.type",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
            ),
            (
                json!({"response_format": with_schema(json!({"schema": 3}))}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"structured_outputs": {"json": "no schema"}}),
                "structured_outputs.json",
            ),
            (
                json!({"structured_outputs": {"regex": "a|b"}}),
                "structured_outputs.regex",
            ),
            (
                json!({"structured_outputs": {"choice": ["a", "b"]}}),
                "structured_outputs.choice",
            ),
            (json!({"guided_json": 3}), "guided_json"),
            (
                json!({"guided_json": {}, "response_format": {"type": "json_object"}}),
                "guided_json",
            ),
        ] {
            let error = read(&body).unwrap_err();
            assert_eq!(error.param(), Some(param), "{body}: {error}");
        }
    }
}
