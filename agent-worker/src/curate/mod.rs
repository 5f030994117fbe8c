//! What an agent worker does with a granted curation, in its `cpu` slots: take over a result that is there already, or
//! build the data set and publish it.
//!
//! ```text
//! store ─► feed ─► choose: which conversations are in ─► feed ─► write: rows ─► shards ─► store ─► manifest ─► version
//!          each pass on a thread of its own; what waits between them is bounded
//! ```
//! One bad conversation ends nothing: the manifest of the data set names it and the reason. Which rows come out is
//! `espalier-dataset`'s; nothing here decides it.

#![expect(
    clippy::result_large_err,
    reason = "an error ends the job: it is made once"
)]

mod error;
mod feed;
mod passes;
mod publish;
mod shards;
mod tokenizer;

use std::sync::Arc;

use bytes::Bytes;
use espalier_core::dataset::DatasetSources;
use espalier_core::error::FieldError;
use espalier_core::layout;
use espalier_core::spec::CurateSpec;
use espalier_core::trace::FileEntry;
use espalier_dataset::{BuildSpec, Filter};
use espalier_proto::v1;
use espalier_runtime::clock::Clock;
use espalier_runtime::datasets::Datasets;
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::publish::{Claim, PublishError, Published, patiently, stopped_outcome};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::worker::{Grant, Handler, JobContext, JobOutcome};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::AgentWorkerConfig;
use crate::serve::Deps;
use error::CurateError;
use feed::{Feed, Item};
use passes::{FirstPass, SecondPass};
use tokenizer::{Tokenizers, Tokens};

/// Items that wait to be looked at.
const ITEMS_WAITING_MAX: usize = 1;
/// Files that wait to be stored.
const FILES_WAITING_MAX: usize = 1;

/// Builds data sets.
pub(crate) struct CurateHandler {
    store: Store,
    clock: Arc<dyn Clock>,
    tokenizers: Tokenizers,
}

/// What an attempt works on.
struct Order<'a> {
    grant: &'a Grant,
    curate: &'a CurateSpec,
    /// Everything that is read, that of the version which is extended before the job's own.
    sources: DatasetSources,
}

/// What an attempt made.
struct Made {
    second: SecondPass,
    files: Vec<FileEntry>,
    /// The file of its tokenizer, unless it is Qwen3's.
    tokenizer: Option<Bytes>,
}

impl CurateHandler {
    /// With the token of the hub and the folders of the configuration.
    pub(crate) fn new(config: &AgentWorkerConfig, deps: &Deps) -> Self {
        let hub = config.hub_settings(&deps.environment);
        Self {
            store: deps.store.clone(),
            clock: Arc::clone(&deps.clock),
            tokenizers: Tokenizers {
                fetcher: Fetcher::new(&deps.environment, None).with_hub(hub),
                allow_folders: config.allow_base_folders,
            },
        }
    }

    async fn attempt(&self, grant: &Grant, context: &JobContext) -> Result<Published, CurateError> {
        let curate = grant.spec.curate().ok_or(CurateError::NoCuration)?;
        let settings = settings(curate)?;
        let spec = espalier_runtime::publish::spec_digest(grant).await?;
        let claim = Claim {
            key: &grant.key,
            fence: grant.fence,
            spec: Some(&spec),
        };
        let order = Order {
            grant,
            curate,
            sources: self.sources(grant, curate).await?,
        };
        let max_runtime = grant.spec.max_runtime;
        let adopted = espalier_runtime::publish::adopt(&self.store, claim, max_runtime, context);
        if let Some(published) = adopted.await? {
            self.version_of_published(&order, context).await?;
            return Ok(published);
        }
        let made = self.build(&order, settings, context).await?;
        context.lease().publishing();
        self.publish(&order, made, claim, context).await
    }

    /// What the job reads.
    async fn sources(
        &self,
        grant: &Grant,
        curate: &CurateSpec,
    ) -> Result<DatasetSources, CurateError> {
        let own = DatasetSources {
            batches: curate.batches.clone(),
            uploads: curate.uploads.clone(),
        };
        let Some(extended) = &curate.extends else {
            return Ok(own);
        };
        let datasets = self.datasets(grant);
        let read = || async {
            let version = datasets.version(&extended.name, Some(extended.version));
            Ok::<_, CurateError>(version.await?)
        };
        let version = patiently(&grant.key, "version", read).await?;
        Ok(version.sources.with(&own))
    }

    /// Reads everything twice, and leaves rows as files.
    async fn build(
        &self,
        order: &Order<'_>,
        settings: BuildSpec,
        context: &JobContext,
    ) -> Result<Made, CurateError> {
        let grant = order.grant;
        let tokens = self.tokenizers.of(order.curate).await?;
        let feed = Feed {
            key: &grant.key,
            store: &self.store,
            context,
        };
        let items = feed.items(&order.sources).await?;
        let first = first_pass(&feed, &items, settings, &tokens).await?;
        let folder = layout::dataset_files(&grant.key, grant.fence);
        let form = (order.curate.max_length, folder);
        self.second_pass(&feed, &items, first, form, tokens).await
    }

    async fn second_pass(
        &self,
        feed: &Feed<'_>,
        items: &[Item],
        first: FirstPass,
        form: (usize, String),
        tokens: Tokens,
    ) -> Result<Made, CurateError> {
        let wanted = first.wanted();
        let (to, from) = mpsc::channel(ITEMS_WAITING_MAX);
        let (finished, mut files) = mpsc::channel(FILES_WAITING_MAX);
        let (stop, _ends) = stops();
        let Tokens { tokenizer, file } = tokens;
        let write = blocking("curate.write", move || {
            passes::write(from, finished, first, form, &tokenizer, &stop)
        });
        let store = async {
            let mut entries = Vec::new();
            while let Some(file) = files.recv().await {
                self.store_file(feed.key, &file.entry, file.content).await?;
                entries.push(file.entry);
            }
            Ok::<_, CurateError>(entries)
        };
        let write = async { write.await? };
        let hand_over = feed.hand_over(items, &wanted, to, "writing");
        let ((), second, files) = tokio::try_join!(hand_over, write, store)?;
        Ok(Made {
            second,
            files,
            tokenizer: file,
        })
    }

    fn datasets(&self, grant: &Grant) -> Datasets {
        Datasets::new(self.store.clone(), grant.key.project.clone())
    }
}

async fn first_pass(
    feed: &Feed<'_>,
    items: &[Item],
    settings: BuildSpec,
    tokens: &Tokens,
) -> Result<FirstPass, CurateError> {
    let (to, from) = mpsc::channel(ITEMS_WAITING_MAX);
    let (stop, _ends) = stops();
    let tokenizer = tokens.tokenizer.clone();
    let choose = blocking("curate.choose", move || {
        passes::choose(from, settings, &tokenizer, &stop)
    });
    let choose = async { choose.await? };
    let all = vec![true; items.len()];
    let hand_over = feed.hand_over(items, &all, to, "reading");
    let ((), first) = tokio::try_join!(hand_over, choose)?;
    Ok(first)
}

/// What tells a thread that nobody waits for it any more: the guard was dropped.
fn stops() -> (CancellationToken, tokio_util::sync::DropGuard) {
    let stop = CancellationToken::new();
    (stop.clone(), stop.drop_guard())
}

/// How the data set is built. The words of the job are checked; what only this crate reads is read here.
fn settings(curate: &CurateSpec) -> Result<BuildSpec, FieldError> {
    let filter = curate.filter.as_deref().map(|text| {
        let read: Result<Filter, _> = text.parse();
        let refuse = |error: espalier_dataset::FilterError| {
            FieldError::new("curate.where", text, format!("is refused: {error}"))
        };
        read.map_err(refuse)
    });
    Ok(BuildSpec {
        filter: filter.transpose()?,
        unroll: curate.unroll.parse()?,
        keep_hints: !curate.drop_hints,
        near: curate.near,
        keep_near: curate.keep_near,
        max_per_kind: curate
            .max_per_kind
            .and_then(|max| usize::try_from(max).ok()),
        eval_share: curate.eval_share,
        seed: curate.seed,
        tokenizer: curate.tokenizer.clone(),
    })
}

impl Handler for CurateHandler {
    fn kind(&self) -> v1::JobKind {
        v1::JobKind::Curate
    }

    async fn run(&self, grant: Grant, context: JobContext) -> JobOutcome {
        let stopped = context.lease().stopped();
        let attempt = Box::pin(self.attempt(&grant, &context));
        match stopped.run_until_cancelled(attempt).await {
            Some(Ok(published)) => published.into(),
            None
            | Some(Err(CurateError::Stopped | CurateError::Publish(PublishError::Stopped))) => {
                stopped_outcome(&context)
            }
            Some(Err(error)) => JobOutcome::failed(error.class(), error_chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::spec::curate::UNROLLS;
    use espalier_core::spec::parse_line;

    use super::*;

    fn spec(inner: &str) -> CurateSpec {
        let line = format!(r#"{{"curate":{{"batches":["b"],"dataset":"d"{inner}}}}}"#);
        let job = parse_line(line.as_bytes()).unwrap().check().unwrap();
        job.curate().unwrap().clone()
    }

    #[test]
    fn a_job_without_words_builds_as_the_data_set_crate_does() {
        assert_eq!(settings(&spec("")).unwrap(), BuildSpec::default());
        for unroll in UNROLLS {
            let settings = settings(&spec(&format!(r#","unroll":"{unroll}""#))).unwrap();
            assert_eq!(settings.unroll.as_str(), unroll);
        }
    }

    #[test]
    fn a_filter_that_is_none_is_refused_by_field() {
        let error = settings(&spec(r#","where":"reward >""#)).unwrap_err();
        assert_eq!(
            (error.field.as_str(), error.value.as_str()),
            ("curate.where", "reward >")
        );
        assert!(error.rule.contains("column"), "{error}");
        assert_eq!(
            CurateError::from(error).class(),
            espalier_core::error::ErrorClass::Invalid
        );
    }
}
