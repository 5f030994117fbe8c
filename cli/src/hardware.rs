//! A look at what models can run on here, which waits for no driver for ever. Used by `up` and `doctor`.

use std::time::Duration;

use espalier_infer_worker::serve::{Survey, survey};
use espalier_runtime::tasks::{blocking, with_deadline};
use espalier_runtime::telemetry::error_chain;

/// Longest that a driver may take to show its devices.
const LOOK_LIMIT: Duration = Duration::from_secs(60);
/// What to do about one that takes longer.
pub const FIX: &str = "look with `nvidia-smi`: a driver that hangs wants a restart of the machine";

/// Looks. Takes no memory of a GPU.
///
/// # Errors
/// What did not end in time.
pub async fn look() -> Result<Survey, String> {
    let looking = blocking("hardware.look", survey);
    match with_deadline("hardware.look", LOOK_LIMIT, looking).await {
        Ok(found) => found.map_err(|error| error_chain(&error)),
        Err(error) => Err(error_chain(&error)),
    }
}
