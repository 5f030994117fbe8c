//! Draws a token from fp32 logits.
//!
//! Order: penalties, bias, mask; then, unless the temperature is 0: temperature, top-k, top-p, min-p, and one draw by
//! inverse distribution in the order of ids. The random number is Philox4x32-10 at counter `step` under key `seed`, so
//! it depends on nothing else. Log-probabilities are of the logits as the model gave them, before all of this.

use super::pool::{Isa, Pool};
use super::simd::{Kernel, Lanes, dispatch, exp};
use crate::sampling::{Penalties, Sampling};

/// What was drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// The token.
    pub id: u32,
    /// Its log-probability under the model.
    pub logprob: f32,
    /// The most probable tokens under the model, descending.
    pub top: Vec<(u32, f32)>,
}

/// Why nothing could be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DrawError {
    /// The mask and the bias leave no token.
    #[error("no token is allowed")]
    NothingAllowed,
    /// The model's logits are no numbers.
    #[error("a logit is not a number")]
    NotANumber,
}

/// Draws from `logits`, one for each id of the real vocabulary: padding ids must not be among them. Logits are used up.
/// Runs on the calling thread, with the instructions of `pool`.
///
/// # Errors
/// When no token is allowed or a logit is NaN.
pub fn draw(pool: &Pool, logits: &mut [f32], how: &Sampling) -> Result<Drawn, DrawError> {
    let isa = pool.isa();
    let mut total = Total {
        logits,
        most: 0.0,
        sum: 0.0,
    };
    dispatch(isa, Sum(&mut total));
    let log_sum = f64::from(total.most) + total.sum.ln();
    if log_sum.is_nan() {
        return Err(DrawError::NotANumber);
    }
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let mut top: Vec<(u32, f32)> = Vec::new();
    let wanted = usize::from(how.logprobs.unwrap_or(0));
    if wanted > 0 {
        let best = most_of(logits, wanted);
        top.extend(best.iter().map(|id| (*id, logprob(logits[*id as usize]))));
    }
    // Processing changes the logits; the drawn token's own is wanted as the model gave it.
    let bias = how.bias.as_deref().unwrap_or_default();
    let seen = how
        .penalties
        .iter()
        .flat_map(|penalties| penalties.seen.iter());
    let touched: Vec<(u32, f32)> = seen
        .map(|seen| seen.id)
        .chain(bias.iter().map(|(id, _)| *id))
        .filter(|id| (*id as usize) < logits.len())
        .map(|id| (id, logits[id as usize]))
        .collect();
    adjust(logits, how);
    let id = if how.effective_temperature() == 0.0 {
        largest(logits)?
    } else {
        sample(isa, logits, how)?
    };
    let before = touched.iter().find(|(touched, _)| *touched == id);
    let logit = before.map_or_else(|| logits[id as usize], |(_, logit)| *logit);
    Ok(Drawn {
        id,
        logprob: logprob(logit),
        top,
    })
}

struct Total<'a> {
    logits: &'a [f32],
    most: f32,
    sum: f64,
}

struct Sum<'a, 'b>(&'a mut Total<'b>);

impl Kernel for Sum<'_, '_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let Total { logits, most, sum } = self.0;
        *most = maximum(logits);
        let mut lanes = [0.0_f64; 16];
        for chunk in logits.chunks(16) {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                // A difference of infinities is no number; a masked logit counts nothing.
                *lane += f64::from(exp(x - *most));
            }
        }
        *sum = lanes.iter().sum();
    }
}

/// The largest of all; NaN when it is not a finite number.
#[inline(always)]
fn maximum(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in logits.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    let most = lanes.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    if most.is_finite() { most } else { f32::NAN }
}

/// The ids of the `count` largest logits, descending, of equals the lowest id first.
fn most_of(logits: &[f32], count: usize) -> Vec<u32> {
    let by = |a: &u32, b: &u32| {
        logits[*b as usize]
            .total_cmp(&logits[*a as usize])
            .then(a.cmp(b))
    };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count < ids.len() {
        ids.select_nth_unstable_by(count, by);
        ids.truncate(count);
    }
    ids.sort_unstable_by(by);
    ids
}

fn adjust(logits: &mut [f32], how: &Sampling) {
    if let Some(penalties) = &how.penalties {
        penalise(logits, penalties);
    }
    for (id, bias) in how.bias.as_deref().unwrap_or_default() {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += bias;
        }
    }
    if let Some(allowed) = &how.allowed {
        for (word, logits) in logits.chunks_mut(32).enumerate() {
            let bits = allowed.get(word).copied().unwrap_or(0);
            for (bit, logit) in logits.iter_mut().enumerate() {
                if bits >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

fn penalise(logits: &mut [f32], penalties: &Penalties) {
    for seen in penalties.seen.iter() {
        let Some(logit) = logits.get_mut(seen.id as usize) else {
            continue;
        };
        *logit = if *logit > 0.0 {
            *logit / penalties.repetition
        } else {
            *logit * penalties.repetition
        };
        if seen.in_answer > 0 {
            *logit -= penalties.presence + penalties.frequency * seen.in_answer as f32;
        }
    }
}

fn largest(logits: &[f32]) -> Result<u32, DrawError> {
    let mut best: Option<(u32, f32)> = None;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > best.map_or(f32::NEG_INFINITY, |(_, most)| most) {
            best = Some((id as u32, *logit));
        }
    }
    best.map(|(id, _)| id).ok_or(DrawError::NothingAllowed)
}

/// Turns logits into weights relative to the largest.
struct Weigh<'a> {
    logits: &'a [f32],
    weights: &'a mut [f32],
    most: f32,
    inverse_temperature: f32,
}

impl Kernel for Weigh<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for (weight, x) in self.weights.iter_mut().zip(self.logits) {
            let exponent = (x - self.most) * self.inverse_temperature;
            *weight = if exponent < -87.0 { 0.0 } else { exp(exponent) };
        }
    }
}

fn sample(isa: Isa, logits: &[f32], how: &Sampling) -> Result<u32, DrawError> {
    let most = maximum(logits);
    if most.is_nan() {
        return Err(DrawError::NothingAllowed);
    }
    let mut weights = vec![0.0; logits.len()];
    let inverse_temperature = 1.0 / how.effective_temperature();
    dispatch(
        isa,
        Weigh {
            logits,
            weights: &mut weights,
            most,
            inverse_temperature,
        },
    );
    let random = uniform(how.seed, how.step);
    let top_k = if how.top_k == 0 {
        weights.len()
    } else {
        how.top_k as usize
    };
    // The largest weight is 1, so that min-p is a bound on weights.
    if top_k < weights.len() || how.top_p < 1.0 {
        let mut kept = kept(&weights, top_k, how.top_p);
        kept.retain(|id| weights[*id as usize] >= how.min_p);
        kept.sort_unstable();
        let kept = kept.iter().map(|id| (*id, weights[*id as usize]));
        pick(kept, random)
    } else {
        let all = (0_u32..).zip(weights.iter().copied());
        pick(all.filter(|(_, weight)| *weight >= how.min_p), random)
    }
    .ok_or(DrawError::NothingAllowed)
}

/// What top-k and then top-p leave, of weights of which the largest is 1.
fn kept(weights: &[f32], top_k: usize, top_p: f32) -> Vec<u32> {
    if top_k < weights.len() {
        let best = most_of(weights, top_k);
        let total: f64 = best.iter().map(|id| f64::from(weights[*id as usize])).sum();
        return cut(best, weights, f64::from(top_p) * total);
    }
    let total: f64 = weights.iter().copied().map(f64::from).sum();
    let goal = f64::from(top_p) * total;
    // The few most probable nearly always reach the goal: the rest need not be sorted.
    let mut count = 256;
    loop {
        let best = most_of(weights, count);
        let sum: f64 = best.iter().map(|id| f64::from(weights[*id as usize])).sum();
        if sum >= goal || count >= weights.len() {
            return cut(best, weights, goal);
        }
        count *= 8;
    }
}

/// The fewest of `best` (descending) whose weights reach `goal`; at least one.
fn cut(mut best: Vec<u32>, weights: &[f32], goal: f64) -> Vec<u32> {
    let mut sum = 0.0;
    let mut count = 0;
    while count < best.len() && (count == 0 || sum < goal) {
        sum += f64::from(weights[best[count] as usize]);
        count += 1;
    }
    best.truncate(count);
    best
}

/// The token at `random` of the way through the weights; none where nothing has weight.
fn pick(weights: impl Iterator<Item = (u32, f32)> + Clone, random: f64) -> Option<u32> {
    let total: f64 = weights.clone().map(|(_, weight)| f64::from(weight)).sum();
    let goal = random * total;
    let mut sum = 0.0;
    let mut last = None;
    for (id, weight) in weights.filter(|(_, weight)| *weight > 0.0) {
        sum += f64::from(weight);
        last = Some(id);
        if sum > goal {
            break;
        }
    }
    last
}

/// Uniform in [0, 1) with 53 bits: the first two words of Philox4x32-10 at counter `(step, 0, 0, 0)` under `seed`.
#[must_use]
pub fn uniform(seed: u64, step: u32) -> f64 {
    let words = philox([step, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(words[1]) << 32 | u64::from(words[0]);
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}

#[cfg(test)]
mod tests;
