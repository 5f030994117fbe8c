//! Steps: micro-batches checked, passed through the model, gradients clipped and given to the optimizer.

use espalier_kernels::train::{AdamStep, Backend, BufferId, MemoryUse, MoeShape, Moments8, Slice};
use espalier_qwen3::{Config, TensorSource};

use super::buffers::Buffers;
use super::forward::Pass;
use super::head::Target;
use super::layout::{Layout, Moments, Parameter};
use super::model::{Model, RoundAll, heads_of, moe_shape};
use super::plan::Plan;
use super::settings::Settings;
use super::{DocumentLoss, Documents, EngineError, Export, State, StepReport, Training};

/// A model on a backend.
pub(crate) struct Trainer<B: Backend> {
    pub(crate) backend: B,
    pub(crate) config: Config,
    pub(crate) settings: Settings,
    pub(crate) layout: Layout,
    pub(crate) model: Model,
    pub(crate) buffers: Buffers<BufferId>,
    pub(crate) plan: Plan,
    /// Steps done.
    pub(crate) steps: u64,
}

/// A micro-batch that was checked.
pub(crate) struct Micro<'a> {
    documents: Documents<'a>,
    targets: Vec<Target>,
    /// Targets of the documents up to and with each.
    target_ends: Vec<usize>,
}

impl<'a> Micro<'a> {
    /// Checks micro-batch `micro` of a step.
    pub(crate) fn check(
        documents: Documents<'a>,
        micro: usize,
        tokens_max: usize,
        vocabulary: usize,
    ) -> Result<Self, EngineError> {
        let refuse = |rule: String| Err(EngineError::Micro { micro, rule });
        let Documents {
            ids,
            ends,
            supervised,
        } = documents;
        if !(1..=tokens_max).contains(&ids.len()) {
            return refuse(format!(
                "must have from 1 to {tokens_max} tokens, got {}",
                ids.len()
            ));
        }
        if supervised.len() != ids.len() {
            return refuse(format!(
                "must say of each of {} tokens whether it is a target, got {}",
                ids.len(),
                supervised.len()
            ));
        }
        let ascending = ends.first().is_some_and(|end| *end > 0)
            && ends.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || ends.last() != Some(&ids.len()) {
            return refuse(format!(
                "ends must ascend from 1 to {}, got {ends:?}",
                ids.len()
            ));
        }
        let mut targets = Vec::new();
        let mut target_ends = Vec::new();
        let mut start = 0;
        for (document, end) in ends.iter().enumerate() {
            let refuse = |rule: String| {
                Err(EngineError::Document {
                    micro,
                    document,
                    rule,
                })
            };
            if supervised[start] {
                return refuse("its first token has nothing to be predicted from".to_owned());
            }
            for at in start..*end {
                let id = ids[at];
                if id as usize >= vocabulary {
                    return refuse(format!(
                        "token {} must be below {vocabulary}, got {id}",
                        at - start
                    ));
                }
                if supervised[at] {
                    let row = (at - 1) as u32;
                    targets.push(Target { row, id });
                }
            }
            target_ends.push(targets.len());
            start = *end;
        }
        Ok(Self {
            documents,
            targets,
            target_ends,
        })
    }

    /// Losses of targets, added up for each document.
    fn by_document(&self, losses: &[f32]) -> Vec<DocumentLoss> {
        let mut start = 0;
        let ends = self.target_ends.iter();
        ends.map(|end| {
            let own = &losses[start..*end];
            start = *end;
            DocumentLoss {
                sum: own.iter().map(|loss| f64::from(*loss)).sum(),
                tokens: own.len() as u64,
            }
        })
        .collect()
    }
}

impl<B: Backend> Trainer<B> {
    pub(crate) fn new(
        config: Config,
        source: &dyn TensorSource,
        settings: &Settings,
        backend: B,
    ) -> Result<Self, EngineError> {
        let budget = settings.memory_budget_bytes;
        let plan = Plan::choose(&config, settings, settings.tokens_max, budget)?;
        Self::with_plan(config, source, settings, backend, plan)
    }

    pub(crate) fn with_plan(
        config: Config,
        source: &dyn TensorSource,
        settings: &Settings,
        mut backend: B,
        mut plan: Plan,
    ) -> Result<Self, EngineError> {
        let (layout, roles) = Layout::new(&config, settings);
        let model = Model::load(&mut backend, &config, source, &layout, &roles)?;
        let buffers = Buffers::take(
            &config,
            &roles,
            &plan.keeps,
            plan.tokens,
            &mut |kind, len, on_host| match on_host {
                true => backend.alloc_host(kind, len),
                false => backend.alloc(kind, len),
            },
        )?;
        backend.write(buffers.turns, 0, &config.turns(plan.tokens));
        let heads = heads_of(&config);
        plan.attention = backend.attend_by(plan.attention, &heads, plan.tokens)?;
        let mut trainer = Self {
            backend,
            config,
            settings: settings.clone(),
            layout,
            model,
            buffers,
            plan,
            steps: 0,
        };
        trainer.draw();
        Ok(trainer)
    }

    fn pass<'a>(&'a mut self, ends: &'a [usize]) -> Pass<'a, B> {
        let config = &self.config;
        Pass {
            backend: &mut self.backend,
            model: &self.model,
            buffers: &self.buffers,
            heads: heads_of(config),
            moe: moe_shape(config) as Option<MoeShape>,
            eps: f64::from(config.rms_norm_eps),
            classes: config.real_vocab_size,
            ends,
            tokens: ends.last().copied().unwrap_or(0),
        }
    }

    pub(crate) fn check<'a>(
        &self,
        documents: Documents<'a>,
        micro: usize,
    ) -> Result<Micro<'a>, EngineError> {
        let vocabulary = self.config.real_vocab_size;
        Micro::check(documents, micro, self.plan.tokens, vocabulary)
    }

    /// Forward, and -log p of each target; with `grad`, backward of `grad` times their sum, unless one is not finite.
    fn run(&mut self, micro: &Micro<'_>, grad: Option<f64>) -> Result<Vec<f32>, EngineError> {
        let ids = micro.documents.ids;
        let mut positions = Vec::with_capacity(ids.len());
        let mut start = 0;
        for end in micro.documents.ends {
            positions.extend(0..(end - start) as u32);
            start = *end;
        }
        self.backend.write_ids(self.buffers.ids, 0, ids);
        self.backend
            .write_ids(self.buffers.positions, 0, &positions);
        let keeps = self.plan.keeps.clone();
        let mut pass = self.pass(micro.documents.ends);
        pass.forward(grad.is_some());
        let losses = pass.loss(&micro.targets, grad);
        pass.backend.check()?;
        if grad.is_some() && losses.iter().all(|loss| loss.is_finite()) {
            pass.backward(&keeps);
        }
        Ok(losses)
    }

    /// Gradients of all micro-batches, added up, and the loss of each document.
    pub(crate) fn gradients(
        &mut self,
        micros: &[Micro<'_>],
        supervised: u64,
    ) -> Result<f64, EngineError> {
        let all = Slice::new(self.model.flat.grads, 0, self.layout.len);
        self.backend.zero(all);
        let mut sum = 0.0;
        for (index, micro) in micros.iter().enumerate() {
            let losses = self.run(micro, Some(1.0 / supervised as f64))?;
            for (document, loss) in micro.by_document(&losses).iter().enumerate() {
                if !loss.sum.is_finite() {
                    return Err(EngineError::LossNotFinite {
                        micro: index,
                        document,
                        loss: loss.sum,
                    });
                }
                sum += loss.sum;
            }
        }
        Ok(sum / supervised as f64)
    }

    fn optimize(&mut self, lr: f64, grad_scale: f64) {
        self.steps += 1;
        let layout = std::mem::take(&mut self.layout);
        let mut first = 0;
        while first < layout.parameters.len() {
            let parameters = &layout.parameters[first..];
            let run = together(parameters);
            self.update(&parameters[..run], lr, grad_scale);
            first += run;
        }
        self.layout = layout;
        self.backend.round_all(&self.model.flat, self.layout.len);
    }

    /// One step for neighbours that are treated alike.
    fn update(&mut self, parameters: &[Parameter], lr: f64, grad_scale: f64) {
        let optimizer = &self.settings.optimizer;
        let step = AdamStep {
            lr,
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            eps: optimizer.eps,
            weight_decay: match parameters[0].decays {
                true => optimizer.weight_decay,
                false => 0.0,
            },
            step: self.steps,
            grad_scale,
        };
        let flat = &self.model.flat;
        let len = parameters.iter().map(|parameter| parameter.len).sum();
        let start = parameters[0].start;
        let value = Slice::new(flat.values, start, len);
        let grad = Slice::new(flat.grads, start, len);
        match parameters[0].moments {
            Moments::Full(start) => {
                let m = Slice::new(flat.m, start, len);
                let v = Slice::new(flat.v, start, len);
                self.backend.adamw(&step, value, grad, m, v);
            }
            Moments::Eight { start, block } => {
                let blocks = len.div_ceil(espalier_kernels::train::BLOCK_8BIT);
                let moments = Moments8 {
                    m: Slice::new(flat.m_codes, start, len),
                    v: Slice::new(flat.v_codes, start, len),
                    m_max: Slice::new(flat.m_max, block, blocks),
                    v_max: Slice::new(flat.v_max, block, blocks),
                };
                self.backend.adamw8(&step, value, grad, &moments);
            }
        }
    }
}

/// How many parameters from the first on one call of the optimizer can take.
fn together(parameters: &[Parameter]) -> usize {
    let first = &parameters[0];
    let alike = |parameter: &&Parameter| {
        parameter.decays == first.decays && matches!(parameter.moments, Moments::Full(_))
    };
    // Blocks of the 8-bit form begin anew with each tensor.
    match first.moments {
        Moments::Eight { .. } => 1,
        Moments::Full(_) => parameters.iter().take_while(alike).count(),
    }
}

impl<B: Backend> Training for Trainer<B> {
    fn step(&mut self, micros: &[Documents<'_>], lr: f64) -> Result<StepReport, EngineError> {
        if !(lr.is_finite() && lr >= 0.0) {
            return Err(EngineError::Setting {
                field: "lr",
                value: lr.to_string(),
                rule: "must be a finite number of at least 0".to_owned(),
            });
        }
        let checked = micros.iter().enumerate();
        let checked = checked
            .map(|(index, documents)| self.check(*documents, index))
            .collect::<Result<Vec<_>, _>>()?;
        let tokens: usize = micros.iter().map(|micro| micro.ids.len()).sum();
        let supervised: u64 = checked.iter().map(|micro| micro.targets.len() as u64).sum();
        if supervised == 0 {
            return Err(EngineError::NothingSupervised { tokens });
        }
        let before = self.backend.flops();
        let loss = self.gradients(&checked, supervised)?;
        let all = Slice::new(self.model.flat.grads, 0, self.layout.len);
        let grad_norm = self.backend.sum_squares(all).sqrt();
        self.backend.check()?;
        if !grad_norm.is_finite() {
            return Err(EngineError::GradientNotFinite { norm: grad_norm });
        }
        // As torch's clip_grad_norm_ has it.
        let clip = self
            .settings
            .clip_norm
            .map_or(1.0, |most| (f64::from(most) / (grad_norm + 1e-6)).min(1.0));
        self.optimize(lr, clip);
        Ok(StepReport {
            loss,
            supervised_tokens: supervised,
            tokens: tokens as u64,
            grad_norm,
            flops: self.backend.flops() - before,
        })
    }

    fn evaluate(&mut self, documents: Documents<'_>) -> Result<Vec<DocumentLoss>, EngineError> {
        let micro = self.check(documents, 0)?;
        let losses = self.run(&micro, None)?;
        Ok(micro.by_document(&losses))
    }

    fn token_losses(&mut self, documents: Documents<'_>) -> Result<Vec<f32>, EngineError> {
        let micro = self.check(documents, 0)?;
        self.run(&micro, None)
    }

    fn state(&mut self) -> State {
        self.read_state()
    }

    fn restore(&mut self, state: State) -> Result<(), EngineError> {
        self.write_state(&state)
    }

    fn adopt(&mut self, source: &dyn TensorSource) -> Result<(), EngineError> {
        self.read_from(source)
    }

    fn export(&mut self) -> Export {
        self.read_export()
    }

    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn memory(&self) -> MemoryUse {
        self.backend.memory()
    }

    fn check_device(&mut self) -> Result<(), EngineError> {
        Ok(self.backend.check()?)
    }
}
