//! What commands share that bring files to the object store and submit jobs for them.

use std::io;
use std::time::Duration;

use espalier_core::id::{BatchId, JobKey, ProjectId};
use espalier_core::layout::{self, UploadName};
use espalier_core::spec::JobDraft;
use espalier_core::trace::sha256_hex;
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock as _, SystemClock};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;

use crate::client::Client;
use crate::context::Context;
use crate::exit::Problem;
use crate::output::note;
use crate::submit::{again, close_batch, open};

/// Age from which files that are in the store already are written again. A batch that was forgotten takes its files
/// with it, if they are old, and the one that is submitted now may have its name.
const UPLOAD_AGE_MAX: Duration = Duration::from_secs(3_600);

/// The store at `url`, or the coordinator's where it is known.
pub async fn open_store(context: &Context, url: Option<&str>) -> Result<Store, Problem> {
    let url = match url {
        Some(url) => Some(url.to_owned()),
        None => context.store_url()?,
    };
    let url = url.ok_or_else(|| {
        Problem::refused("the object store of the coordinator is not known")
            .fix("name it with --store URL")
    })?;
    Ok(Store::open(&url).await?)
}

/// Files lie among the uploads of a project, and its jobs read nothing else: the open batch must be of `project`.
pub async fn check_project(
    client: &Client,
    batch: &BatchId,
    project: &ProjectId,
) -> Result<(), Problem> {
    let request = v1::GetBatchRequest {
        batch: batch.to_string(),
    };
    let batch = again(client, || {
        let (mut jobs, request) = (client.jobs(), request.clone());
        async move { jobs.get_batch(request).await }
    })
    .await?;
    if batch.project == project.as_str() {
        return Ok(());
    }
    let message = format!(
        "the token is of project `{}`, and `{project}` was named",
        batch.project
    );
    Err(Problem::refused(message).fix("name the token's project with --project"))
}

/// Uploads what `read` gives for the jobs of `batch`, under the name of its content, unless it is there and young.
pub async fn upload(
    store: &Store,
    project: &ProjectId,
    batch: &BatchId,
    read: impl FnOnce() -> io::Result<Vec<u8>> + Send + 'static,
) -> Result<UploadName, Problem> {
    let read = blocking("uploads.read", move || {
        let content = read()?;
        let sha256 = sha256_hex(&content);
        Ok::<_, io::Error>((content, sha256))
    });
    let read = read.await;
    let (content, sha256) = read.map_err(|error| Problem::failed(error.to_string()))??;
    let name = UploadName::of_batch(batch, &sha256)?;
    let path = layout::upload(project, &name);
    match store.head(&path).await {
        Ok(there) if SystemClock.now().since(there.modified) < UPLOAD_AGE_MAX => {}
        // Whoever reads it meanwhile reads the same.
        Ok(_) => store.put(&path, content.into()).await?,
        Err(error) if error.is_not_found() => {
            store.create(&path, content.into()).await?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(name)
}

/// Submits jobs of which none may be refused.
pub async fn submit_all(
    client: &Client,
    batch: &BatchId,
    chunk: u32,
    jobs: &[v1::JobSpec],
) -> Result<(), Problem> {
    let request = v1::SubmitChunkRequest {
        batch: batch.to_string(),
        chunk,
        jobs: jobs.to_vec(),
    };
    let answer = again(client, || {
        let (mut jobs, request) = (client.jobs(), request.clone());
        async move { jobs.submit_chunk(request).await }
    })
    .await?;
    let errors = answer.rejected.iter().flat_map(|rejected| &rejected.errors);
    let errors: Vec<String> = errors
        .map(|error| format!("`{}` {}, got `{}`", error.field, error.rule, error.value))
        .collect();
    match errors.is_empty() {
        true => Ok(()),
        false => Err(Problem::refused(errors.join("; "))),
    }
}

/// Submits the one job of a batch of its own. Repeating it changes nothing.
pub async fn submit_alone(client: &Client, key: &JobKey, job: &JobDraft) -> Result<(), Problem> {
    open(client, &key.batch, v1::JobSpec::default()).await?;
    check_project(client, &key.batch, &key.project).await?;
    submit_all(client, &key.batch, 0, &[draft_to_wire(job)]).await?;
    close_batch(client, &key.batch).await?;
    note(format!("batch {}", key.batch));
    Ok(())
}
