//! Everything that training changes, as named tensors: masters and moments. What is read is written back bit for bit.

use espalier_kernels::train::{BLOCK_8BIT, Backend, BufferId, Slice};
use espalier_qwen3::{Draw, TensorSource, hashed};

use super::EngineError;
use super::layout::{Moments, Parameter};
use super::model::RoundAll;
use super::step::Trainer;

/// A state.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Tensors, each parameter's followed by those of its moments.
    pub tensors: Vec<StateTensor>,
}

/// One of its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct StateTensor {
    /// A parameter's name, or that with `.m`, `.v`, `.m.codes`, `.m.max`, `.v.codes` or `.v.max` behind it.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its numbers.
    pub values: StateValues,
}

/// Numbers of a state's tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum StateValues {
    /// Masters, moments in full, largest magnitudes of blocks.
    F32(Vec<f32>),
    /// Codes of moments in 8 bits.
    U8(Vec<u8>),
}

impl StateValues {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::U8(codes) => codes.len(),
        }
    }

    fn is_bytes(&self) -> bool {
        matches!(self, Self::U8(_))
    }
}

/// Where a tensor of the state is on the device.
struct Place {
    name: String,
    shape: Vec<usize>,
    at: Slice,
    bytes: bool,
}

impl<B: Backend> Trainer<B> {
    fn places(&self) -> Vec<Place> {
        let all = self.layout.parameters.iter();
        all.flat_map(|parameter| self.places_of(parameter))
            .collect()
    }

    fn places_of(&self, parameter: &Parameter) -> Vec<Place> {
        let flat = &self.model.flat;
        let place = |suffix: &str, shape: Vec<usize>, buffer: BufferId, start, bytes| Place {
            name: format!("{}{suffix}", parameter.name),
            at: Slice::new(buffer, start, shape.iter().product()),
            shape,
            bytes,
        };
        let shape = || parameter.shape.clone();
        let mut places = vec![place("", shape(), flat.values, parameter.start, false)];
        match parameter.moments {
            Moments::Full(start) => {
                places.push(place(".m", shape(), flat.m, start, false));
                places.push(place(".v", shape(), flat.v, start, false));
            }
            Moments::Eight { start, block } => {
                let blocks = || vec![parameter.len.div_ceil(BLOCK_8BIT)];
                places.push(place(".m.codes", shape(), flat.m_codes, start, true));
                places.push(place(".m.max", blocks(), flat.m_max, block, false));
                places.push(place(".v.codes", shape(), flat.v_codes, start, true));
                places.push(place(".v.max", blocks(), flat.v_max, block, false));
            }
        }
        places
    }

    pub(crate) fn read_state(&mut self) -> State {
        let places = self.places();
        let tensors = places
            .into_iter()
            .map(|place| StateTensor {
                name: place.name,
                shape: place.shape,
                values: match place.bytes {
                    true => StateValues::U8(self.backend.read_bytes(place.at)),
                    false => StateValues::F32(self.backend.read(place.at)),
                },
            })
            .collect();
        State {
            step: self.steps,
            tensors,
        }
    }

    pub(crate) fn write_state(&mut self, state: &State) -> Result<(), EngineError> {
        let places = self.places();
        let refuse = |name: &str, rule: String| {
            Err(EngineError::State {
                name: name.to_owned(),
                rule,
            })
        };
        for (i, place) in places.iter().enumerate() {
            let Some(tensor) = state.tensors.get(i) else {
                return refuse(&place.name, "is missing".to_owned());
            };
            if tensor.name != place.name {
                return refuse(&tensor.name, format!("must be {}", place.name));
            }
            let fits = tensor.shape == place.shape && tensor.values.len() == place.at.len;
            if !fits || tensor.values.is_bytes() != place.bytes {
                let kind = if place.bytes { "bytes" } else { "f32" };
                let rule = format!("must be {kind} {:?}, got {:?}", place.shape, tensor.shape);
                return refuse(&tensor.name, rule);
            }
        }
        if let Some(tensor) = state.tensors.get(places.len()) {
            return refuse(&tensor.name, "is none of this engine's".to_owned());
        }
        for (place, tensor) in places.iter().zip(&state.tensors) {
            match &tensor.values {
                StateValues::F32(values) => {
                    self.backend.write(place.at.buffer, place.at.start, values);
                }
                StateValues::U8(codes) => {
                    self.backend
                        .write_bytes(place.at.buffer, place.at.start, codes);
                }
            }
        }
        self.steps = state.step;
        self.backend.round_all(&self.model.flat, self.layout.len);
        Ok(())
    }

    /// Takes values of all that is trained from a source, by the names of the export.
    pub(crate) fn read_from(&mut self, source: &dyn TensorSource) -> Result<(), EngineError> {
        let mut all = Vec::with_capacity(self.layout.len);
        for parameter in &self.layout.parameters {
            let values = source.tensor(&parameter.name, &parameter.shape)?.to_vec();
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Err(EngineError::State {
                    name: parameter.name.clone(),
                    rule: format!("must hold finite numbers, got {value}"),
                });
            }
            all.extend(values);
        }
        self.backend.write(self.model.flat.values, 0, &all);
        self.backend.round_all(&self.model.flat, self.layout.len);
        Ok(())
    }

    /// Draws the `A`s of an adapter; `B`s are zero.
    pub(crate) fn draw(&mut self) {
        let drawn = self.layout.parameters.iter().enumerate();
        for (index, parameter) in drawn.filter(|(_, p)| p.name.ends_with(".lora_A.weight")) {
            let inputs = parameter.shape[1] as f64;
            let draw = Draw {
                seed: self.settings.seed % (1 << 24),
                start: (index as u64) << 32,
                scale: (1.0 / inputs.sqrt()) as f32,
                offset: 0.0,
            };
            let values = hashed(draw, parameter.len);
            self.backend
                .write(self.model.flat.values, parameter.start, &values);
        }
        self.backend.round_all(&self.model.flat, self.layout.len);
    }
}
