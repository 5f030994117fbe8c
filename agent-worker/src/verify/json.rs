//! Scores what a JSON path finds in an answer. The path is a job's and the answer a model's, so both are hostile: `core`
//! bounds the path, this module the value that it runs over and the time that it takes. Called by the walk of the tree.

use std::time::Duration;

use espalier_core::error::{ErrorClass, shorten};
use espalier_core::spec::pattern;
use espalier_runtime::tasks::{blocking, with_deadline};
use serde_json::Value;

use super::{ProbeError, Scored};

/// Deepest value that a path runs over: `..` visits every node once for each of its ancestors.
const DEPTH_MAX: usize = 64;
/// Most values within it, itself included: a filter may look at all of them for each of them.
const VALUES_MAX: usize = 10_000;
/// Longest that a path may take. Honest ones need less than a thousandth of it, so that what needs more is the job's
/// fault and not that of a busy worker.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Scores what `path` finds in the first JSON value of `answer`.
///
/// # Errors
/// The path takes too long, which ends the attempt: another try would take as long.
pub async fn score(path: &str, equals: Option<&Value>, answer: &str) -> Scored {
    let (text, equals, answer) = (path.to_owned(), equals.cloned(), answer.to_owned());
    let work = move || find(&text, equals.as_ref(), &answer);
    score_within(TIMEOUT, path, work).await
}

/// Work that comes to no end keeps its thread, but neither the async ones nor the attempt.
async fn score_within(
    timeout: Duration,
    path: &str,
    work: impl FnOnce() -> (f64, String) + Send + 'static,
) -> Scored {
    let work = blocking("verify.json_path", work);
    let refused = |class, message| Err(ProbeError { class, message });
    match with_deadline("verify.json_path", timeout, work).await {
        Ok(Ok(scored)) => Ok(scored),
        Ok(Err(error)) => refused(ErrorClass::Infra, error.to_string()),
        Err(_) => {
            let message = format!(
                "`json_path` must find its values within {timeout:?}, got `{}`",
                shorten(path)
            );
            refused(ErrorClass::Invalid, message)
        }
    }
}

fn find(path: &str, equals: Option<&Value>, answer: &str) -> (f64, String) {
    let Some(value) = first_json(answer) else {
        return (
            0.0,
            format!("the answer holds no JSON: `{}`", shorten(answer.trim())),
        );
    };
    if !is_bounded(&value) {
        let reason = format!(
            "the answer's JSON must hold at most {VALUES_MAX} values, at most {DEPTH_MAX} deep"
        );
        return (0.0, reason);
    }
    let Ok(path) = pattern::json_path(path) else {
        return (0.0, format!("`{}` is not a path", shorten(path)));
    };
    let found = path.query(&value).all();
    match (found.first(), equals) {
        (None, _) => (
            0.0,
            format!(
                "`{path}` finds nothing in `{}`",
                shorten(&value.to_string())
            ),
        ),
        (Some(_), None) => (1.0, format!("`{path}` finds a value")),
        (Some(_), Some(wanted)) if found.iter().any(|value| same(value, wanted)) => (
            1.0,
            format!("`{path}` finds `{}`", shorten(&wanted.to_string())),
        ),
        (Some(first), Some(wanted)) => (
            0.0,
            format!(
                "`{path}` finds `{}`, not `{}`",
                shorten(&first.to_string()),
                shorten(&wanted.to_string())
            ),
        ),
    }
}

/// 5 and 5.0 are the same number to a reader, though not to JSON's types.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Models wrap JSON in prose and fences: take the first place where a value can be read.
fn first_json(text: &str) -> Option<Value> {
    let whole = serde_json::from_str(text.trim()).ok();
    whole.or_else(|| {
        let starts = text.char_indices().filter(|(_, c)| matches!(c, '{' | '['));
        // Each try may read to the end of the text; a bound keeps a hostile answer from costing its square.
        starts.take(64).find_map(|(start, _)| {
            let mut values =
                serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
            values.next()?.ok()
        })
    })
}

/// Whether a path may run over the value.
fn is_bounded(value: &Value) -> bool {
    let mut seen = 0_usize;
    let mut open = vec![(value, 1_usize)];
    while let Some((value, depth)) = open.pop() {
        seen += 1;
        if seen > VALUES_MAX || depth > DEPTH_MAX {
            return false;
        }
        match value {
            Value::Array(list) => open.extend(list.iter().map(|inner| (inner, depth + 1))),
            Value::Object(map) => open.extend(map.values().map(|inner| (inner, depth + 1))),
            _ => {}
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(depth: usize) -> String {
        "[".repeat(depth) + &"]".repeat(depth)
    }

    #[test]
    fn values_are_bounded_in_depth_and_number() {
        let score = |answer: &str| find("$", None, answer);
        assert_eq!(score(&nested(DEPTH_MAX)).0, 1.0);
        let (deep, reason) = score(&nested(DEPTH_MAX + 1));
        assert_eq!(deep, 0.0);
        assert!(reason.contains("at most 64 deep"), "{reason}");
        let list = |count: usize| format!("{:?}", vec![1; count]);
        assert_eq!(score(&list(VALUES_MAX - 1)).0, 1.0);
        assert_eq!(score(&list(VALUES_MAX)).0, 0.0);
    }

    #[tokio::test]
    async fn a_path_without_end_ends_the_attempt_and_holds_no_async_thread() {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let forever = move || {
            let _ = ended.recv();
            (1.0, String::new())
        };
        let error = score_within(Duration::from_millis(10), "$..a", forever)
            .await
            .unwrap_err();
        assert_eq!(error.class, ErrorClass::Invalid);
        assert_eq!(
            error.message,
            "`json_path` must find its values within 10ms, got `$..a`"
        );
        drop(end);
    }

    #[tokio::test]
    async fn a_path_that_the_door_would_refuse_scores_nothing() {
        let path = "$..[?@..[?@..a]]";
        let (score, reason) = score(path, None, "[1]").await.unwrap();
        assert_eq!(
            (score, reason.as_str()),
            (0.0, "`$..[?@..[?@..a]]` is not a path")
        );
    }
}
