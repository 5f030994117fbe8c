//! What coordinators stand on: their configuration, the Redis of their queue, and the object store, wherever flags,
//! variables or a configuration file say that those are.

use std::time::Duration;

use espalier_coordinator::CoordinatorConfig;
use espalier_coordinator::config::ENV_PREFIX;
use espalier_coordinator::queue::{self, Acknowledge, Aspect, ConnectError, Grade};
use espalier_runtime::config::{self, Environment, Secret};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::error_chain;
use serde::Deserialize;

use super::{Doctor, Finding, Level};
use crate::client::store_dir;
use crate::context::Context;
use crate::exit::Problem;

/// Longest that a Redis may take: connecting has 3 s, and each of two answers 5 s.
const REDIS_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest that a store may take, with the retries of its own.
const STORE_TIMEOUT: Duration = Duration::from_secs(60);
/// What `queue` says where there is no server.
const EMBEDDED: &str = "embedded";

/// The keys of a coordinator's configuration that say what it stands on.
#[derive(Default, Deserialize)]
pub struct Keys {
    queue: Option<Secret>,
    #[serde(default)]
    queue_acknowledge: Acknowledge,
    store_url: Option<String>,
}

/// Reads the keys, and checks a configuration file as a coordinator would.
pub fn keys(context: &Context, args: &Doctor) -> (Keys, Vec<Finding>) {
    let environment = over(args, context.environment.clone());
    let file = args.coordinator_config.as_deref();
    let mut findings = Vec::new();
    if let Some(file) = file {
        let loaded = config::load::<CoordinatorConfig>(Some(file), ENV_PREFIX, &environment);
        let checked = loaded
            .map_err(|error| error_chain(&error))
            .and_then(|config| config.validate().map_err(|error| error.to_string()));
        findings.push(match checked {
            Ok(()) => Finding::ok("configuration", file.display().to_string()),
            Err(error) => Finding::fail("configuration", error, "correct the key that is named"),
        });
    }
    match config::load::<Keys>(file, ENV_PREFIX, &environment) {
        Ok(keys) => (keys, findings),
        Err(error) => {
            // A file that cannot be read at all has been found above.
            if findings.is_empty() {
                let fix = "correct the variable that is named";
                findings.push(Finding::fail("configuration", error_chain(&error), fix));
            }
            (Keys::default(), findings)
        }
    }
}

/// The environment, in which what the command line says takes the place of the variable of the same key.
fn over(args: &Doctor, mut environment: Environment) -> Environment {
    for (key, option) in [("QUEUE", &args.queue), ("STORE_URL", &args.store)] {
        if let Some(value) = option {
            environment.insert(format!("{ENV_PREFIX}{key}"), value.clone());
        }
    }
    environment
}

/// Whether a queue may lie on the Redis that is named; nothing where none is.
pub async fn redis(keys: &Keys) -> Vec<Finding> {
    let Some(url) = &keys.queue else {
        return Vec::new();
    };
    if url.expose() == EMBEDDED {
        return vec![Finding::ok("queue", "embedded: a file of the coordinator")];
    }
    let examined = queue::examine(url, keys.queue_acknowledge);
    match with_deadline("doctor.redis", REDIS_TIMEOUT, examined).await {
        Ok(Ok(aspects)) => aspects.into_iter().map(finding).collect(),
        Ok(Err(ConnectError::Config(error))) => vec![Finding::fail(
            "redis",
            error.to_string(),
            "correct `queue`; a password with /, @ or % in it is written in percent-encoding",
        )],
        Ok(Err(error)) => vec![away(error_chain(&error))],
        Err(timeout) => vec![away(timeout.to_string())],
    }
}

fn away(error: String) -> Finding {
    Finding::fail(
        "redis",
        error,
        "start Redis, or correct host, port, user and password in `queue`",
    )
}

fn finding(aspect: Aspect) -> Finding {
    let level = match aspect.grade {
        Grade::Good => Level::Ok,
        Grade::Poor => Level::Warn,
        Grade::Unfit => Level::Fail,
    };
    let what = format!("redis {}", aspect.what);
    Finding::new(what, level, aspect.seen, aspect.fix)
}

/// Whether the store can be written and creates an object once only.
pub async fn store(context: &Context, keys: &Keys) -> Finding {
    let url = match store_url(context, keys) {
        Ok(url) => url,
        Err(problem) => return super::checks::refused("object store", &problem),
    };
    let fix = match url.starts_with("s3://") {
        true => {
            "check the bucket, AWS_ENDPOINT_URL, AWS_REGION and the credentials; the server has to honour \
                 If-None-Match on PUT"
        }
        false => "name another one with --store",
    };
    let error = match with_deadline("doctor.store", STORE_TIMEOUT, Store::open(&url)).await {
        Ok(Ok(_)) => {
            let seen = format!("{url}: can be written, creates each object once");
            return Finding::ok("object store", seen);
        }
        Ok(Err(error)) => error_chain(&error),
        Err(timeout) => format!("{url}: {timeout}"),
    };
    Finding::fail("object store", error, fix)
}

/// The coordinator's store, or the one of the local `up`.
fn store_url(context: &Context, keys: &Keys) -> Result<String, Problem> {
    if let Some(url) = &keys.store_url {
        return Ok(url.clone());
    }
    match context.store_url()? {
        Some(url) => Ok(url),
        None => Ok(format!(
            "file://{}",
            store_dir(&context.data_dir()?).display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use espalier_testbed::redis::RedisServer;

    use super::*;

    fn keys(url: &str) -> Keys {
        Keys {
            queue: Some(Secret::new(url)),
            ..Keys::default()
        }
    }

    fn of<'a>(findings: &'a [Finding], what: &str) -> &'a Finding {
        let found = findings.iter().find(|finding| finding.what == what);
        found.unwrap_or_else(|| panic!("{what} in {findings:?}"))
    }

    #[tokio::test]
    async fn a_good_redis_passes_and_one_that_evicts_does_not() {
        let server = RedisServer::start_with(&[("maxmemory", "64mb")]).await;
        let findings = redis(&keys(&server.url())).await;
        assert_eq!(findings.len(), 7, "{findings:?}");
        for finding in &findings {
            assert_eq!(finding.level, Level::Ok, "{finding:?}");
        }
        assert!(of(&findings, "redis disk").seen.contains("everysec"));

        server
            .cli(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"])
            .await;
        server.cli(&["CONFIG", "SET", "maxmemory", "0"]).await;
        let findings = redis(&keys(&server.url())).await;
        let evicts = of(&findings, "redis eviction");
        assert_eq!(evicts.level, Level::Fail);
        assert!(evicts.fix.contains("`noeviction`"), "{evicts:?}");
        assert_eq!(of(&findings, "redis memory").level, Level::Warn);
    }

    #[tokio::test]
    async fn a_redis_that_is_not_there_or_refuses_the_password_is_a_fault_without_the_password() {
        let mut server = RedisServer::start().await;
        server
            .cli(&["CONFIG", "SET", "requirepass", "hunter2"])
            .await;
        let url = |password| format!("redis://:{password}@127.0.0.1:{}", server.port());
        let (right, wrong) = (keys(&url("hunter2")), keys(&url("hunter3")));
        assert_eq!(of(&redis(&right).await, "redis server").level, Level::Ok);
        let mut said = redis(&wrong).await;
        server.kill();
        said.extend(redis(&right).await);
        assert_eq!(said.len(), 2, "{said:?}");
        for finding in said {
            assert_eq!(finding.level, Level::Fail);
            let text = format!("{} {}", finding.seen, finding.fix);
            assert!(!text.contains("hunter"), "{text}");
        }
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_refused_by_its_form() {
        let [finding] = &redis(&keys("http://:hunter2@h")).await[..] else {
            panic!("one finding");
        };
        assert!(finding.seen.contains("must be redis://"), "{finding:?}");
        assert!(!finding.seen.contains("hunter2"), "{finding:?}");
        assert!(redis(&Keys::default()).await.is_empty());
    }
}
