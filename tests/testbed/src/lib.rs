//! What tests of every crate stand on: processes that die with their test, real Redis and S3 servers, a TCP proxy
//! that shows faults, stand-ins for the Hugging Face hub and for RunPod, and waits that say what they waited for.
//!
//! It knows nothing of Espalier, so that any crate may use it for its own tests. Nothing that is shipped depends on
//! it, and nothing here judges: a helper that cannot do its part panics with what to do about it.

pub mod hosts;
pub mod hub;
pub mod ports;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod runpod;
pub mod s3;

use std::fmt::Debug;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a condition is looked at. Short against every deadline that a test has.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `look` gives a value. Without one after `deadline`, panics with what it saw last.
pub async fn wait_for<T, S, F>(what: &str, deadline: Duration, mut look: impl FnMut() -> F) -> T
where
    S: Debug,
    F: Future<Output = Result<T, S>>,
{
    let started = Instant::now();
    loop {
        match look().await {
            Ok(value) => return value,
            Err(seen) if started.elapsed() > deadline => {
                panic!("waited {deadline:?} for {what}; last seen: {seen:?}")
            }
            Err(_) => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

/// The server `name`, which `make setup-test` installs. A test that needs it fails without it: one that is skipped in
/// silence shows nothing.
fn installed(name: &str) -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../target/venv/bin")
        .join(name);
    let search = std::env::var_os("PATH").unwrap_or_default();
    let elsewhere = std::env::split_paths(&search).map(|folder| folder.join(name));
    std::iter::once(own)
        .chain(elsewhere)
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("`{name}` is not installed: run `make setup-test`"))
}
