//! What `espalier up` computes on. The model that it serves and the trainings that it runs are on one machine: each has a GPU
//! of its own where there are two, and a part of the memory where there is one.

use std::fmt;
use std::time::Duration;

use clap::Args;
use espalier_core::error::FieldError;
use espalier_infer_worker::config::Device;
use espalier_infer_worker::serve::{Survey, survey};
use espalier_runtime::tasks::{blocking, with_deadline};
use espalier_runtime::telemetry::error_chain;

use super::config::UpFileConfig;
use crate::exit::Problem;

/// Share of a GPU's memory that the model has where it is alone there: `espalier-infer-worker`'s own.
const SHARE_ALONE: f64 = 0.9;
/// The same where trainings have what it leaves: they hold the base model too, and activations in place of keys and values.
const SHARE_BESIDE_TRAININGS: f64 = 0.5;
/// Longest that a driver may take to show its devices.
const LOOK_LIMIT: Duration = Duration::from_secs(60);

/// Shortest context that `espalier-infer-worker` takes.
const CONTEXT_MIN: u32 = 16;

/// What is asked for. None: what suits machine and model.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq)]
pub struct Asked {
    /// What a model that is served here runs on: auto (a GPU where there is one), cpu or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<Device>,
    /// What trainings run on, likewise [default: with two GPUs the one that serves no model here, else what `auto` is]
    #[arg(long, value_name = "DEVICE")]
    pub train_device: Option<Device>,
    /// Share of its GPU's memory for a model that is served here, in (0, 1] [default: 0.9, or 0.5 where trainings run there too]
    #[arg(long, value_name = "SHARE")]
    pub gpu_memory_utilization: Option<f64>,
    /// Longest prompt and answer together of a model that is served here, in tokens [default: the model's]
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<u32>,
}

impl Asked {
    /// These, and those of the file where these say nothing.
    pub(super) fn or_of_file(self, file: &UpFileConfig) -> Result<Self, FieldError> {
        let read = |field, text: &Option<String>| match text.as_deref().map(str::parse) {
            None => Ok(None),
            Some(Ok(device)) => Ok(Some(device)),
            Some(Err(rule)) => Err(FieldError::new(
                field,
                text.as_deref().unwrap_or_default(),
                rule,
            )),
        };
        let model = &file.model;
        let asked = Self {
            device: self.device.or(read("model.device", &model.device)?),
            train_device: self
                .train_device
                .or(read("train_device", &file.train_device)?),
            gpu_memory_utilization: self.gpu_memory_utilization.or(model.gpu_memory_utilization),
            max_model_len: self.max_model_len.or(model.max_model_len),
        };
        if let Some(share) = asked
            .gpu_memory_utilization
            .filter(|share| !(*share > 0.0 && *share <= 1.0))
        {
            return Err(FieldError::new(
                "gpu_memory_utilization",
                share,
                "must be in (0, 1]",
            ));
        }
        if let Some(tokens) = asked.max_model_len.filter(|tokens| *tokens < CONTEXT_MIN) {
            return Err(FieldError::new(
                "max_model_len",
                tokens,
                format!("must be at least {CONTEXT_MIN}"),
            ));
        }
        Ok(asked)
    }

    /// A model that is served elsewhere is served as that place says.
    pub(super) fn check_is_elsewhere(&self) -> Result<(), FieldError> {
        let shown =
            |field, value: Option<&dyn fmt::Display>| value.map(|value| (field, value.to_string()));
        let given = [
            shown("device", self.device.as_ref().map(|v| v as _)),
            shown(
                "gpu_memory_utilization",
                self.gpu_memory_utilization.as_ref().map(|v| v as _),
            ),
            shown("max_model_len", self.max_model_len.as_ref().map(|v| v as _)),
        ];
        let Some((field, value)) = given.into_iter().flatten().next() else {
            return Ok(());
        };
        let rule = "must be left out where an endpoint is named: the model is not served here";
        Err(FieldError::new(field, value, rule))
    }
}

/// What computes where: never [`Device::Auto`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Devices {
    /// What a model is served on that is served here.
    pub(super) serve: Device,
    /// Share of the memory of that GPU which it may use.
    pub(super) memory_share: f64,
    /// What trainings run on.
    pub(super) train: Device,
}

impl Devices {
    /// Looks at the machine and chooses.
    pub(super) async fn find(asked: Asked, serves_here: bool) -> Result<Self, Problem> {
        let looking = blocking("up.devices", survey);
        let found = with_deadline("up.devices", LOOK_LIMIT, looking).await;
        let found = found
            .map_err(|error| error_chain(&error))
            .and_then(|found| found.map_err(|error| error_chain(&error)));
        let found = found.map_err(|text| {
            Problem::failed(text)
                .fix("look with `nvidia-smi`: a driver that hangs wants a restart of the machine")
        })?;
        if let Err(why) = &found.auto {
            tracing::info!(why, "no GPU is used unless it is named");
        }
        Ok(Self::choose(asked, serves_here, &Gpus::of(&found)))
    }

    fn choose(asked: Asked, serves_here: bool, gpus: &Gpus) -> Self {
        let named = |asked: Option<Device>| match asked.unwrap_or(Device::Auto) {
            Device::Auto => gpus.auto.map_or(Device::Cpu, Device::Cuda),
            named => named,
        };
        let serve = named(asked.device);
        let train = match (asked.train_device, serve) {
            (None, Device::Cuda(taken)) if serves_here => Device::Cuda(gpus.beside(taken)),
            (train, _) => named(train),
        };
        let is_shared = serves_here && serve == train;
        let share = match is_shared {
            true => SHARE_BESIDE_TRAININGS,
            false => SHARE_ALONE,
        };
        Self {
            serve,
            memory_share: asked.gpu_memory_utilization.unwrap_or(share),
            train,
        }
    }

    /// Where a model is served, in words.
    pub(super) fn serving(&self) -> String {
        match (self.serve, self.serve == self.train) {
            (Device::Cuda(_), true) => format!(
                "{}, with {:.0} % of its memory",
                self.serve,
                self.memory_share * 100.0
            ),
            _ => self.serve.to_string(),
        }
    }
}

/// The GPUs on which models can run.
struct Gpus {
    /// The one that is taken where none is named.
    auto: Option<u32>,
    all: Vec<u32>,
}

impl Gpus {
    fn of(found: &Survey) -> Self {
        Self {
            auto: found.auto.as_ref().ok().map(|gpu| gpu.ordinal as u32),
            all: found.usable.clone(),
        }
    }

    /// Another one than that, where there is one.
    fn beside(&self, taken: u32) -> u32 {
        let mut others = self.all.iter().filter(|gpu| **gpu != taken);
        others.next().copied().unwrap_or(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(asked: Asked, serves_here: bool, gpus: &[u32]) -> (String, String, f64) {
        let gpus = Gpus {
            auto: gpus.contains(&0).then_some(0),
            all: gpus.to_vec(),
        };
        let found = Devices::choose(asked, serves_here, &gpus);
        (
            found.serve.to_string(),
            found.train.to_string(),
            found.memory_share,
        )
    }

    #[test]
    fn a_model_and_trainings_share_what_there_is() {
        for (gpus, expected) in [
            (&[][..], ("cpu", "cpu")),
            (&[0], ("cuda:0", "cuda:0")),
            (&[0, 1, 2], ("cuda:0", "cuda:1")),
            // The first one is of no use: none is taken that is not named.
            (&[1], ("cpu", "cpu")),
        ] {
            let (serve, train, share) = chosen(Asked::default(), true, gpus);
            assert_eq!((&*serve, &*train), expected, "{gpus:?}");
            assert!(
                share == if gpus == [0] { 0.5 } else { 0.9 } || serve == "cpu",
                "{gpus:?}"
            );
        }
    }

    #[test]
    fn a_model_that_is_served_elsewhere_leaves_the_gpu_to_trainings() {
        let (_, train, _) = chosen(Asked::default(), false, &[0, 1]);
        assert_eq!(train, "cuda:0");
        assert_eq!(chosen(Asked::default(), false, &[]).1, "cpu");
    }

    #[test]
    fn what_is_asked_for_wins() {
        let asked = |device, train_device, gpu_memory_utilization| Asked {
            device,
            train_device,
            gpu_memory_utilization,
            max_model_len: None,
        };
        let (cpu, first, second) = (
            Some(Device::Cpu),
            Some(Device::Cuda(0)),
            Some(Device::Cuda(1)),
        );
        for (asked, gpus, expected) in [
            (asked(None, cpu, None), &[0][..], ("cuda:0", "cpu", 0.9)),
            (asked(cpu, None, None), &[0], ("cpu", "cuda:0", 0.9)),
            (
                asked(second, None, None),
                &[0, 1],
                ("cuda:1", "cuda:0", 0.9),
            ),
            (asked(None, first, None), &[0, 1], ("cuda:0", "cuda:0", 0.5)),
            (
                asked(None, None, Some(0.3)),
                &[0],
                ("cuda:0", "cuda:0", 0.3),
            ),
            // Whoever names one that is not there is told so when it is opened.
            (asked(first, second, None), &[], ("cuda:0", "cuda:1", 0.9)),
        ] {
            let (serve, train, share) = chosen(asked, true, gpus);
            assert_eq!((&*serve, &*train, share), expected, "{asked:?} on {gpus:?}");
        }
    }
}
