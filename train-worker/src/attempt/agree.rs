//! Before the first step: what training computes of tokens that the base model sampled while it was served, held against
//! what was recorded then.
//!
//! A LoRA that has just been drawn changes nothing, so that the model is still its base. What cannot be compared is told
//! with its reason, and costs no training.

use espalier_core::adapter::{Agreement, Difference};
use espalier_core::id::{BatchId, JobKey};
use espalier_core::trace::Trace;
use espalier_qwen3_text::Tokenizer;
use espalier_runtime::publish::patiently;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::{self, error_chain};
use espalier_runtime::traces::{Traces, TracesError};

use super::rows::Reading;
use super::{Training, Workshop};
use crate::data::{Rules, Sampled};
use crate::error::TrainError;

/// Jobs that are looked at: where these say nothing, those after them hardly do.
const JOBS_MAX: usize = 64;

/// What was found, and why there is not more.
#[derive(Default)]
struct Found {
    sampled: Sampled,
    jobs: usize,
    /// The first reason.
    reason: Option<String>,
}

impl Workshop {
    /// How near `training`, which has not begun, is to serving; none: it is told of no rollouts.
    ///
    /// # Errors
    /// The device has failed, or the process is told to end.
    pub(super) async fn agree(
        &self,
        training: &mut Training,
        reading: Reading<'_>,
    ) -> Result<Option<Agreement>, TrainError> {
        if training.spec.agreement.is_empty() {
            return Ok(None);
        }
        (reading.tell)("comparing with what was served");
        let rules = Rules {
            max_length: training.bench.as_ref().map_or(0, |bench| bench.tokens_max),
            ..reading.rules
        };
        let batches = &training.spec.agreement;
        let found = self.find_sampled(batches, Reading { rules, ..reading });
        let found = found.await?;
        let jobs = found.jobs;
        let compared = match found.sampled.is_empty() {
            true => {
                let none = || format!("batch `{}` holds no rollout", batches[0]);
                Err(found.reason.unwrap_or_else(none))
            }
            false => training.compare(found.sampled, &self.shutdown).await?,
        };
        let key = reading.key;
        Ok(Some(match compared {
            Ok(difference) => {
                note(key, difference);
                Agreement::Measured(difference)
            }
            Err(reason) => {
                tracing::warn!(job = %key, jobs, reason, "not compared with what was served");
                Agreement::unmeasured(&reason)
            }
        }))
    }

    /// What the first traces recorded that say anything, in the order of batches and jobs.
    async fn find_sampled(
        &self,
        batches: &[BatchId],
        reading: Reading<'_>,
    ) -> Result<Found, TrainError> {
        let Reading { key, rules, .. } = reading;
        let mut found = Found::default();
        let tokenizer = match reading.base.1 {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                found.note(error_chain(error.as_ref()));
                return Ok(found);
            }
        };
        let traces = Traces::new(self.store.clone(), key.project.clone());
        for batch in batches {
            let list = || async { traces.list(Some(batch)).await };
            let listed = match patiently(key, "traces", list).await {
                Ok(listed) => listed,
                Err(error) => {
                    found.note(error_chain(&error));
                    continue;
                }
            };
            for listed in listed {
                if found.jobs == JOBS_MAX || found.sampled.is_full() {
                    return Ok(found);
                }
                found.jobs += 1;
                let load = || async { traces.load(&listed).await };
                match patiently(key, "traces", load).await {
                    Ok(loaded) => {
                        let tokenizer = tokenizer.clone();
                        let add = move || found.add(&loaded.trace, &tokenizer, rules);
                        found = blocking("train.sampled", add).await?;
                    }
                    // The job is no rollout.
                    Err(TracesError::NotPublished(_)) => {}
                    Err(error) => found.note(error_chain(&error)),
                }
            }
        }
        Ok(found)
    }
}

/// Says how far training is from serving, and warns where it is too far.
fn note(key: &JobKey, difference: Difference) {
    let Difference {
        traces,
        tokens,
        mean,
        max,
    } = difference;
    telemetry::metrics().train_agreement.record(mean, &[]);
    match difference.is_too_far() {
        true => {
            tracing::warn!(job = %key, traces, tokens, mean, max, "not what was served is trained, by its log-probabilities");
        }
        false => {
            tracing::info!(job = %key, traces, tokens, mean, max, "compared with what was served");
        }
    }
}

impl Found {
    fn note(&mut self, reason: String) {
        self.reason.get_or_insert(reason);
    }

    fn add(mut self, trace: &Trace, tokenizer: &Tokenizer, rules: Rules) -> Self {
        if let Err(error) = self.sampled.add(trace, tokenizer, rules) {
            self.note(format!("`{}`: {error}", trace.header.job));
        }
        self
    }
}

impl Training {
    /// The difference, or why there is none.
    async fn compare(
        &mut self,
        sampled: Sampled,
        shutdown: &Shutdown,
    ) -> Result<Result<Difference, String>, TrainError> {
        let Some(mut bench) = self.bench.take() else {
            return Err(TrainError::Stopped);
        };
        let shutdown = shutdown.clone();
        let compare = move || {
            let compared =
                sampled.difference(bench.tokens_max, |documents| match shutdown.is_draining() {
                    true => Err(TrainError::Preempted { step: 0 }),
                    false => Ok(bench.trainer.token_losses(documents)?),
                });
            (bench, compared)
        };
        let (bench, compared) = blocking("train.agreement", compare).await?;
        self.bench = Some(bench);
        match compared {
            Ok(Some(difference)) => Ok(Ok(difference)),
            Ok(None) => Ok(Err("a log-probability is not finite".to_owned())),
            Err(error @ TrainError::Preempted { .. }) => Err(error),
            Err(error) if error.is_of_device() => Err(error),
            Err(error) => Ok(Err(error_chain(&error))),
        }
    }
}
