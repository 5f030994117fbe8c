//! RunPod's description of its REST v2, held against what is asked and what is answered.
//!
//! It is read as RunPod publishes it (`openapi.json` of REST v2 in its documentation), from beside this checkout; it is no part of
//! it.

use axum::http::Method;
use serde_json::{Map, Value, json};

use super::schema::Schemas;

/// Where the description is.
const DESCRIPTION: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../../shared/data/runpod-openapi-v2.json"
);
/// The paths that this server knows.
const PATHS: [&str; 3] = ["/v2/pods", "/v2/pods/{id}", "/v2/catalog/gpus"];

/// What may be asked, and how it is answered.
#[derive(Debug)]
pub struct Contract {
    description: Value,
    schemas: Schemas,
}

/// One method of one path.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'a> {
    /// As described, such as `/v2/pods/{id}`.
    pub path: &'a str,
    rules: &'a Value,
}

/// Why there is no operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// No such path.
    Path,
    /// The path has others.
    Method,
}

impl Contract {
    /// The published one; none, and a line that says so, where there is no copy of it.
    pub fn read() -> Option<Self> {
        let Ok(text) = std::fs::read_to_string(DESCRIPTION) else {
            println!("SKIPPED: RunPod's description is not at {DESCRIPTION}");
            return None;
        };
        let mut description: Value = serde_json::from_str(&text).expect("the description is JSON");
        let paths = description["paths"].as_object_mut().expect("paths");
        paths.retain(|path, _| PATHS.contains(&path.as_str()));
        assert_eq!(paths.len(), PATHS.len(), "RunPod has other paths now");
        let components = description["components"].clone();
        resolve(&mut description["paths"], &components);
        Some(Self {
            schemas: Schemas::of(&description),
            description,
        })
    }

    /// The operation that a request means, and the id in its path.
    pub fn find(&self, method: &Method, path: &str) -> Result<(Operation<'_>, String), Unknown> {
        let paths = self.description["paths"].as_object().expect("paths");
        let found = paths.iter().find_map(|(template, methods)| {
            let id = fits(template, path)?;
            Some((template.as_str(), methods, id))
        });
        let (path, methods, id) = found.ok_or(Unknown::Path)?;
        let method = method.as_str().to_ascii_lowercase();
        let rules = methods.get(method).ok_or(Unknown::Method)?;
        Ok((Operation { path, rules }, id))
    }

    /// What a query breaks: parameters that are not described, and values of another type.
    pub fn query_faults(
        &self,
        operation: Operation<'_>,
        query: &[(String, String)],
    ) -> Vec<String> {
        let described = operation.rules["parameters"].as_array();
        let check = |(name, text): &(String, String)| {
            let named = |rule: &&Value| rule["name"] == *name;
            let Some(rule) = described.into_iter().flatten().find(named) else {
                return vec![format!("query.{name}: unknown parameter")];
            };
            let schema = &rule["schema"];
            let faults = self.schemas.faults(schema, &typed(schema, text));
            faults
                .iter()
                .map(|fault| format!("query.{name}{fault}"))
                .collect()
        };
        query.iter().flat_map(check).collect()
    }

    /// What a body breaks; of an operation that takes none, that there is one.
    pub fn body_faults(&self, operation: Operation<'_>, body: &[u8]) -> Vec<String> {
        let Some(rules) = operation.rules.get("requestBody") else {
            return match body.is_empty() {
                true => Vec::new(),
                false => vec!["$: a body is not allowed".to_owned()],
            };
        };
        let schema = &rules["content"]["application/json"]["schema"];
        match serde_json::from_slice::<Value>(body) {
            Ok(value) => self.schemas.faults(schema, &value),
            Err(error) => vec![format!("$: is no JSON: {error}")],
        }
    }

    /// Panics where an answer of this server is not as RunPod's are: a test that passes against it would show nothing.
    pub fn assert_answer(&self, operation: Operation<'_>, status: u16, body: Option<&Value>) {
        let described = &operation.rules["responses"];
        let answer = described.get(status.to_string());
        let answer = answer
            .or_else(|| described.get("default"))
            .expect("an answer");
        let content = answer["content"]
            .as_object()
            .and_then(|all| all.values().next());
        match (content, body) {
            (None, None) => {}
            (Some(content), Some(body)) => {
                let faults = self.schemas.faults(&content["schema"], body);
                assert!(
                    faults.is_empty(),
                    "an answer that RunPod does not give: {faults:?}"
                );
            }
            (content, body) => panic!("{status} has {content:?}, answered {body:?}"),
        }
    }
}

/// Puts parameters and answers where the description refers to them by name; schemas keep their names.
fn resolve(part: &mut Value, components: &Value) {
    let name = part["$ref"]
        .as_str()
        .and_then(|reference| reference.strip_prefix("#/components"));
    let found = name.and_then(|name| components.pointer(name));
    if let Some(found) = found.filter(|_| name.is_some_and(|name| !name.starts_with("/schemas/"))) {
        *part = found.clone();
    }
    match part {
        Value::Object(fields) => fields
            .values_mut()
            .for_each(|field| resolve(field, components)),
        Value::Array(items) => items.iter_mut().for_each(|item| resolve(item, components)),
        _ => {}
    }
}

/// The part of `path` in the place of `{…}` of `template`, or nothing where it has none; `None` if it is another path.
fn fits(template: &str, path: &str) -> Option<String> {
    let Some((before, after)) = template.split_once('{') else {
        return (template == path).then(String::new);
    };
    let (_, after) = after.split_once('}')?;
    let id = path.strip_prefix(before)?.strip_suffix(after)?;
    (!id.is_empty() && !id.contains('/')).then(|| id.to_owned())
}

/// The text of a parameter as the JSON that its schema is about; as text where it cannot be.
fn typed(schema: &Value, text: &str) -> Value {
    match schema["type"].as_str() {
        Some("array") => text.split(',').map(Value::from).collect(),
        Some("integer" | "boolean") => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
        _ => json!(text),
    }
}

/// A refusal, as RunPod words it.
pub fn problem(status: u16, title: &str, detail: &str, errors: &[String]) -> Value {
    let mut problem = Map::new();
    problem.insert("title".to_owned(), json!(title));
    problem.insert("status".to_owned(), json!(status));
    problem.insert("detail".to_owned(), json!(detail));
    if !errors.is_empty() {
        problem.insert("errors".to_owned(), json!(errors));
    }
    Value::Object(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_methods_are_those_of_the_description() {
        let Some(contract) = Contract::read() else {
            return;
        };
        let find = |method, path| contract.find(&method, path).map(|(op, id)| (op.path, id));
        assert_eq!(
            find(Method::GET, "/v2/pods"),
            Ok(("/v2/pods", String::new()))
        );
        assert_eq!(
            find(Method::DELETE, "/v2/pods/a1"),
            Ok(("/v2/pods/{id}", "a1".to_owned()))
        );
        assert_eq!(find(Method::PUT, "/v2/pods/a1"), Err(Unknown::Method));
        for path in ["/v1/pods", "/v2/pods/", "/v2/pods/a/b", "/v2/pods/a1/logs"] {
            assert_eq!(find(Method::GET, path), Err(Unknown::Path), "{path}");
        }
    }

    #[test]
    fn queries_and_bodies_are_held_against_it() {
        let Some(contract) = Contract::read() else {
            return;
        };
        let (gpus, _) = contract.find(&Method::GET, "/v2/catalog/gpus").unwrap();
        let query = |text: &str| {
            let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
            let pairs: Vec<_> = pairs.map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
            contract.query_faults(gpus, &pairs)
        };
        assert!(
            query("include=AVAILABILITY&product=POD,SERVERLESS&count=2&cloud=SECURE").is_empty()
        );
        for wrong in [
            "include=PRICE",
            "count=0",
            "count=two",
            "product=POD,X",
            "page=1",
        ] {
            assert_eq!(query(wrong).len(), 1, "{wrong}: {:?}", query(wrong));
        }
        let (create, _) = contract.find(&Method::POST, "/v2/pods").unwrap();
        let body = |value: Value| contract.body_faults(create, value.to_string().as_bytes());
        assert!(body(json!({"name": "a", "image": "b", "gpu": {"id": "c"}})).is_empty());
        for wrong in [
            json!({"name": "a", "gpu": {"id": "c"}}),
            json!({"name": "", "image": "b"}),
            json!({"name": "a", "image": "b", "gpuTypeId": "c"}),
            json!({"name": "a", "image": "b", "gpu": {"id": "c", "size": 1}}),
            json!({"name": "a", "image": "b", "cloud": "secure"}),
            json!({"name": "a", "image": "b", "env": {"N": 1}}),
            json!({"name": "a", "image": "b", "mounts": {"persistent": {"size": 5, "path": "/w"}}}),
        ] {
            assert_eq!(
                body(wrong.clone()).len(),
                1,
                "{wrong}: {:?}",
                body(wrong.clone())
            );
        }
    }
}
