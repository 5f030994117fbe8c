//! What `espalier up` computes on. The model that it serves and the trainings that it runs are on one machine: each has a GPU
//! of its own where there are two, and a part of the memory where there is one.

use std::fmt;

use clap::Args;
use espalier_core::error::FieldError;
use espalier_infer_worker::config::{Device, MODEL_LEN_MIN};
use espalier_infer_worker::serve::{DeviceFound, Survey};

use super::config::UpFileConfig;
use crate::exit::Problem;
use crate::hardware;

/// Share of a GPU's memory for the model where trainings have what it leaves: they hold the base model too, and activations in place
/// of keys and values.
const SHARE_BESIDE_TRAININGS: f64 = 0.5;

/// What is asked for. None: what suits machine and model.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq)]
pub struct Asked {
    /// What a model that is served here runs on: auto (a GPU where there is one), cpu or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<Device>,
    /// What trainings run on, likewise; auto is another GPU than that of a model that is served here, where there is one [default: auto]
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
        let read =
            |field, text: &Option<String>| match text.as_deref().map(|text| (text, text.parse())) {
                None => Ok(None),
                Some((_, Ok(device))) => Ok(Some(device)),
                Some((text, Err(rule))) => Err(FieldError::new(field, text, rule)),
            };
        let model = &file.model;
        let asked = Self {
            device: self.device.or(read("device", &model.device)?),
            train_device: self
                .train_device
                .or(read("train_device", &file.train_device)?),
            gpu_memory_utilization: self.gpu_memory_utilization.or(model.gpu_memory_utilization),
            max_model_len: self.max_model_len.or(model.max_model_len),
        };
        let is_share = |share: &f64| *share > 0.0 && *share <= 1.0;
        if let Some(share) = asked
            .gpu_memory_utilization
            .filter(|share| !is_share(share))
        {
            return Err(FieldError::new(
                "gpu_memory_utilization",
                share,
                "must be in (0, 1]",
            ));
        }
        if let Some(tokens) = asked.max_model_len.filter(|tokens| *tokens < MODEL_LEN_MIN) {
            let rule = format!("must be at least {MODEL_LEN_MIN}");
            return Err(FieldError::new("max_model_len", tokens, rule));
        }
        Ok(asked)
    }

    /// A model that is served elsewhere is served as that place says.
    pub(super) fn check_is_elsewhere(&self) -> Result<(), FieldError> {
        let (device, share, tokens) =
            (self.device, self.gpu_memory_utilization, self.max_model_len);
        let given: [(_, Option<&dyn fmt::Display>); 3] = [
            ("device", device.as_ref().map(|device| device as _)),
            (
                "gpu_memory_utilization",
                share.as_ref().map(|share| share as _),
            ),
            ("max_model_len", tokens.as_ref().map(|tokens| tokens as _)),
        ];
        for (field, value) in given {
            if let Some(value) = value {
                let rule =
                    "must be left out where an endpoint is named: the model is not served here";
                return Err(FieldError::new(field, value, rule));
            }
        }
        Ok(())
    }
}

/// What computes where: never [`Device::Auto`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Devices {
    /// What a model is served on that is served here.
    pub(super) serve: Device,
    /// Share of the memory of that GPU which it may use; none: the worker's own.
    pub(super) memory_share: Option<f64>,
    /// What trainings run on.
    pub(super) train: Device,
    /// Whether nobody asked for that sharing.
    may_yield: bool,
}

impl Devices {
    /// Looks at the machine, where anything but its CPU is asked for, and chooses.
    pub(super) async fn find(asked: Asked, serves_here: bool) -> Result<Self, Problem> {
        let is_cpu = |device| device == Some(Device::Cpu);
        if is_cpu(asked.train_device) && (is_cpu(asked.device) || !serves_here) {
            return Ok(Self::choose(asked, serves_here, &Gpus::default()));
        }
        let found = hardware::look().await.map_err(|text| {
            let fix = format!(
                "{}; --device cpu and --train-device cpu do without it",
                hardware::FIX
            );
            Problem::failed(text).fix(fix)
        })?;
        let gpus = Gpus::of(&found);
        for (field, device) in [
            ("device", asked.device),
            ("train_device", asked.train_device),
        ] {
            gpus.check(field, device)?;
        }
        if let Err(why) = &found.auto {
            tracing::info!(why, "no GPU is used unless it is named");
        }
        Ok(Self::choose(asked, serves_here, &gpus))
    }

    fn choose(asked: Asked, serves_here: bool, gpus: &Gpus) -> Self {
        let named = |asked: Option<Device>| asked.filter(|device| *device != Device::Auto);
        let auto = gpus.auto.map_or(Device::Cpu, Device::Cuda);
        let serve = named(asked.device).unwrap_or(auto);
        let train = named(asked.train_device).unwrap_or(match serve {
            Device::Cuda(taken) if serves_here => Device::Cuda(gpus.beside(taken)),
            _ => auto,
        });
        let is_shared = serves_here && serve == train && serve != Device::Cpu;
        Self {
            serve,
            memory_share: asked
                .gpu_memory_utilization
                .or(is_shared.then_some(SHARE_BESIDE_TRAININGS)),
            train,
            may_yield: is_shared
                && asked.gpu_memory_utilization.is_none()
                && named(asked.train_device).is_none(),
        }
    }

    /// The same with the GPU for the model alone, and the CPU for trainings, where nobody asked for another division.
    pub(super) fn yielded(self) -> Option<Self> {
        self.may_yield.then_some(Self {
            memory_share: None,
            train: Device::Cpu,
            may_yield: false,
            ..self
        })
    }

    /// Where a model is served, in words.
    pub(super) fn serving(&self) -> String {
        match (self.serve, self.memory_share) {
            (Device::Cuda(_), Some(share)) => {
                format!("{}, with {:.0} % of its memory", self.serve, share * 100.0)
            }
            _ => self.serve.to_string(),
        }
    }
}

/// The GPUs on which models can run.
#[derive(Default)]
struct Gpus {
    /// The one that is taken where none is named.
    auto: Option<u32>,
    /// Of each N of `cuda:N` and the bytes of its memory.
    all: Vec<(u32, usize)>,
    /// Why there are none.
    none: Option<String>,
}

impl Gpus {
    fn of(found: &Survey) -> Self {
        let gpu = |gpu: &DeviceFound| (gpu.ordinal as u32, gpu.memory_bytes);
        Self {
            auto: found.auto.as_ref().ok().map(|found| gpu(found).0),
            all: found.usable.iter().map(gpu).collect(),
            none: found.auto.as_ref().err().cloned(),
        }
    }

    /// Refuses a GPU that cannot be used.
    fn check(&self, field: &str, asked: Option<Device>) -> Result<(), FieldError> {
        let Some(device @ Device::Cuda(ordinal)) = asked else {
            return Ok(());
        };
        let names: Vec<String> = self
            .all
            .iter()
            .map(|(gpu, _)| Device::Cuda(*gpu).to_string())
            .collect();
        let rule = match (&self.none, &names[..]) {
            _ if self.all.iter().any(|(gpu, _)| *gpu == ordinal) => return Ok(()),
            (Some(why), []) => format!("must be cpu: no GPU can be used here ({why})"),
            (_, names) => format!(
                "must be cpu or one of {}: no other GPU can be used here",
                names.join(", ")
            ),
        };
        Err(FieldError::new(field, device, rule))
    }

    /// The largest other one than that, unless that is more than twice as large.
    fn beside(&self, taken: u32) -> u32 {
        let memory = |wanted: u32| {
            self.all
                .iter()
                .find(|(gpu, _)| *gpu == wanted)
                .map_or(0, |(_, bytes)| *bytes)
        };
        let others = self
            .all
            .iter()
            .filter(|(gpu, bytes)| *gpu != taken && *bytes >= memory(taken) / 2);
        // The first of equals.
        let largest = others.rev().max_by_key(|(_, bytes)| *bytes);
        largest.map_or(taken, |(gpu, _)| *gpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of GPUs with so many GB each.
    fn gpus(memory: &[(u32, usize)]) -> Gpus {
        Gpus {
            auto: memory.iter().any(|(gpu, _)| *gpu == 0).then_some(0),
            all: memory.iter().map(|(gpu, gb)| (*gpu, *gb << 30)).collect(),
            none: memory.is_empty().then(|| "there is no driver".to_owned()),
        }
    }

    fn chosen(
        asked: Asked,
        serves_here: bool,
        memory: &[(u32, usize)],
    ) -> (String, String, Option<f64>) {
        let found = Devices::choose(asked, serves_here, &gpus(memory));
        (
            found.serve.to_string(),
            found.train.to_string(),
            found.memory_share,
        )
    }

    fn asked(device: Option<Device>, train_device: Option<Device>, share: Option<f64>) -> Asked {
        Asked {
            device,
            train_device,
            gpu_memory_utilization: share,
            max_model_len: None,
        }
    }

    #[test]
    fn a_model_and_trainings_share_what_there_is() {
        for (memory, expected) in [
            (&[][..], ("cpu", "cpu", None)),
            (&[(0, 24)], ("cuda:0", "cuda:0", Some(0.5))),
            (&[(0, 24), (1, 24), (2, 24)], ("cuda:0", "cuda:1", None)),
            (&[(0, 24), (1, 24), (2, 80)], ("cuda:0", "cuda:2", None)),
            // A small one beside it would hold less than half of it does.
            (&[(0, 24), (1, 8)], ("cuda:0", "cuda:0", Some(0.5))),
            // The first one is of no use: none is taken that is not named.
            (&[(1, 24)], ("cpu", "cpu", None)),
        ] {
            for auto in [None, Some(Device::Auto)] {
                let (serve, train, share) = chosen(asked(auto, auto, None), true, memory);
                assert_eq!((&*serve, &*train, share), expected, "{memory:?}");
            }
        }
    }

    #[test]
    fn a_model_that_is_served_elsewhere_leaves_the_gpu_to_trainings() {
        let (_, train, share) = chosen(Asked::default(), false, &[(0, 24), (1, 24)]);
        assert_eq!((&*train, share), ("cuda:0", None));
        assert_eq!(chosen(Asked::default(), false, &[]).1, "cpu");
    }

    #[test]
    fn what_is_asked_for_wins() {
        let (cpu, first, second) = (
            Some(Device::Cpu),
            Some(Device::Cuda(0)),
            Some(Device::Cuda(1)),
        );
        let (one, two) = (&[(0, 24)][..], &[(0, 24), (1, 24)][..]);
        for (asked, memory, expected) in [
            (asked(None, cpu, None), one, ("cuda:0", "cpu", None)),
            (asked(cpu, None, None), one, ("cpu", "cuda:0", None)),
            (asked(second, None, None), two, ("cuda:1", "cuda:0", None)),
            (
                asked(None, first, None),
                two,
                ("cuda:0", "cuda:0", Some(0.5)),
            ),
            (
                asked(None, None, Some(0.3)),
                one,
                ("cuda:0", "cuda:0", Some(0.3)),
            ),
        ] {
            let (serve, train, share) = chosen(asked, true, memory);
            assert_eq!(
                (&*serve, &*train, share),
                expected,
                "{asked:?} on {memory:?}"
            );
        }
    }

    #[test]
    fn a_model_gets_the_whole_gpu_where_nobody_asked_for_a_part() {
        let yields = |asked| Devices::choose(asked, true, &gpus(&[(0, 24)])).yielded();
        let alone = yields(Asked::default()).unwrap();
        assert_eq!((alone.train, alone.memory_share), (Device::Cpu, None));
        assert_eq!(alone.yielded(), None);
        assert_eq!(yields(asked(None, None, Some(0.5))), None);
        assert_eq!(yields(asked(None, Some(Device::Cuda(0)), None)), None);
        assert_eq!(yields(asked(Some(Device::Cpu), None, None)), None);
    }

    #[test]
    fn a_gpu_that_is_not_there_is_refused_by_its_field() {
        let says = |memory: &[(u32, usize)], device| {
            let refused = gpus(memory).check("train_device", Some(device));
            refused.map_err(|error| error.to_string())
        };
        assert_eq!(says(&[(0, 24)], Device::Cuda(0)), Ok(()));
        assert_eq!(says(&[], Device::Auto), Ok(()));
        let other = says(&[(0, 24), (2, 24)], Device::Cuda(1)).unwrap_err();
        assert!(
            other.contains("`train_device` must be cpu or one of cuda:0, cuda:2"),
            "{other}"
        );
        let none = says(&[], Device::Cuda(0)).unwrap_err();
        assert!(
            none.contains("there is no driver") && none.contains("cuda:0"),
            "{none}"
        );
    }
}
