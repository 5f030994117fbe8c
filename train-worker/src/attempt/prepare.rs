//! What comes before the first step: base model, samples, engine, and the checkpoint to go on from.

use std::sync::Arc;

use espalier_core::error::FieldError;
use espalier_core::spec::{SpecDigest, TrainMethod, TrainSpec};
use espalier_qwen3::Config;
use espalier_runtime::store::OBJECT_BYTES_MAX;
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::worker::Grant;

use super::base::Base;
use super::rows::Reading;
use super::{Bench, Tell, Training, Workshop};
use crate::checkpoint::{Expected, Place, Totals, newest};
use crate::data::{Cursor, Order, Rules};
use crate::error::TrainError;
use crate::report::History;

impl Workshop {
    /// Makes a training ready, from the newest checkpoint of an earlier attempt where there is one.
    pub(super) async fn prepare(
        &self,
        grant: &Grant,
        train: &TrainSpec,
        digest: &SpecDigest,
        tell: Tell<'_>,
    ) -> Result<Training, TrainError> {
        tell("fetching the base model");
        let Base {
            folder,
            config,
            tokenizer,
            model,
        } = self.base_model(train).await?;
        let mut spec = train.clone();
        spec.settings.max_length = max_length(grant, train, &config)?;
        check_size(&spec, &config)?;
        let reading = Reading {
            key: &grant.key,
            base: (&train.base, &tokenizer),
            rules: Rules {
                vocabulary: config.real_vocab_size,
                max_length: spec.settings.max_length,
            },
            tell,
        };
        let data = Box::pin(self.data(&train.data, reading)).await?;
        let data_sha256 = data.sha256();
        let mut order = Order::new(data.samples.lengths(), &spec.settings, config.max_positions);
        let longest_held_out = data
            .held_out
            .as_ref()
            .and_then(|h| h.lengths().into_iter().max());
        let tokens_max = order
            .micro_tokens_max()
            .max(longest_held_out.unwrap_or_default());
        tell("loading the model");
        let machine = Arc::clone(&self.machine).acquire_owned().await;
        // Never closed.
        let machine = machine.map_err(|_| TrainError::Stopped)?;
        let (loader, settings) = (Arc::clone(&self.loader), spec.settings.clone());
        let from = folder.clone();
        let load = move || {
            let steps = order.steps();
            let trainer = loader.load(&from, &config, &settings, tokens_max);
            trainer.map(|trainer| (trainer, order, steps))
        };
        let (trainer, order, steps) = blocking("train.load", load).await??;
        let mut training = Training {
            spec,
            digest: digest.clone(),
            place: Place {
                store: self.store.clone(),
                key: grant.key.clone(),
                fence: grant.fence,
            },
            base: model,
            folder,
            dataset: data.path,
            data_sha256,
            steps,
            cursor: Cursor::default(),
            totals: Totals::default(),
            best: None,
            agreement: None,
            history: History::default(),
            checkpoint: None,
            bench: Some(Bench {
                trainer,
                order,
                samples: data.samples,
                held_out: data.held_out,
                tokens_max,
                _machine: machine,
            }),
        };
        training.resume().await?;
        if training.step() == 0 {
            training.agreement = Box::pin(self.agree(&mut training, reading)).await?;
        }
        Ok(training)
    }
}

impl Training {
    /// What a checkpoint of this training must be of.
    pub(super) fn expected(&self) -> Expected<'_> {
        Expected {
            spec: &self.digest,
            base_sha256: &self.base.sha256,
            data_sha256: &self.data_sha256,
        }
    }

    async fn resume(&mut self) -> Result<(), TrainError> {
        let Some(found) = newest(&self.place, self.expected()).await? else {
            return Ok(());
        };
        let Some(mut bench) = self.bench.take() else {
            return Ok(());
        };
        let state = found.state;
        let restored = blocking("train.restore", move || {
            let restored = bench.trainer.restore(state);
            (bench, restored)
        });
        let (bench, restored) = restored.await?;
        self.bench = Some(bench);
        if let Err(error) = restored {
            let error = error_chain(&error);
            tracing::warn!(job = %self.place.key, error, "a checkpoint does not fit: training begins anew");
            return Ok(());
        }
        let record = found.record;
        self.cursor = record.cursor;
        self.totals = record.totals;
        self.best = record.best;
        self.agreement = record.agreement;
        self.history = found.history;
        self.checkpoint = Some(record.step);
        Ok(())
    }

    /// Steps that are done.
    pub(super) fn step(&self) -> u64 {
        self.history.last().map_or(0, |step| step.step)
    }
}

/// The longest sample: what the job says must fit the model; where it says nothing, the model's own length does.
fn max_length(grant: &Grant, train: &TrainSpec, config: &Config) -> Result<usize, TrainError> {
    let draft = grant.draft.train.as_ref();
    let is_given = draft.is_some_and(|draft| draft.settings.max_length.is_some());
    let asked = train.settings.max_length;
    if is_given && asked > config.max_positions {
        let rule = format!("must be at most {}, the model's", config.max_positions);
        return Err(FieldError::new("train.settings.max_length", asked, rule).into());
    }
    Ok(asked.min(config.max_positions))
}

/// A model that is trained as a whole must fit into the store, tensor by tensor: better said now than at the end.
fn check_size(spec: &TrainSpec, config: &Config) -> Result<(), TrainError> {
    let embedding = config.vocab_size as u64 * config.hidden_size as u64 * 2;
    if spec.settings.method != TrainMethod::Full || embedding <= super::publish::SHARD_BYTES_MAX {
        return Ok(());
    }
    Err(TrainError::TooLarge {
        file: "model.embed_tokens.weight".to_owned(),
        bytes: embedding,
        bytes_max: OBJECT_BYTES_MAX,
    })
}
