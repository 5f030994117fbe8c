//! What commands share that bring files to the object store and submit jobs for them.

use std::io;

use espalier_core::id::{BatchId, ProjectId};
use espalier_core::layout::{self, UploadName};
use espalier_core::trace::sha256_hex;
use espalier_proto::v1;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;

use crate::client::Client;
use crate::context::Context;
use crate::exit::Problem;
use crate::submit::again;

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

/// Uploads what `read` gives under the name of its content, unless it is there.
pub async fn upload(
    store: &Store,
    project: &ProjectId,
    read: impl FnOnce() -> io::Result<Vec<u8>> + Send + 'static,
) -> Result<UploadName, Problem> {
    let read = blocking("uploads.read", move || {
        let content = read()?;
        let sha256 = sha256_hex(&content);
        Ok::<_, io::Error>((content, sha256))
    });
    let read = read.await;
    let (content, sha256) = read.map_err(|error| Problem::failed(error.to_string()))??;
    let name = UploadName::new(&format!("{sha256}.jsonl"))?;
    let path = layout::upload(project, &name);
    match store.head(&path).await {
        Ok(_) => {}
        Err(error) if error.is_not_found() => store.put(&path, content.into()).await?,
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

/// Whether a job is over, however it ended.
pub fn has_ended(job: &v1::Job) -> bool {
    use v1::JobState::{Cancelled, Dead, Succeeded};
    matches!(job.state(), Succeeded | Dead | Cancelled)
}
