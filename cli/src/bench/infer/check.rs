//! Whether both servers compute the same model: figures count only then.

use std::path::Path;

use super::server::{Form, Kind, Server, Setup};
use super::visit::ids;
use crate::exit::Problem;

const PROMPTS: u64 = 4;
const PROMPT_TOKENS: usize = 48;
const ANSWER_TOKENS: u32 = 12;
/// How many of llama.cpp's most likely ids ours may be among where they differ.
const LIKELY: u32 = 5;

/// Log-probability that the two may be apart. llama.cpp rounds activations to the form of the weights; ours are f32, or
/// rounded to bf16 where the processor multiplies that (AVX512_BF16).
fn margin(form: Form) -> f64 {
    match form {
        Form::Bf16 => 0.05,
        Form::Q8 => 0.2,
    }
}

/// Greedy answers, of which each may leave the other's only at a place where llama.cpp is undecided.
pub struct Agreement {
    /// What both say of the instructions that they use.
    pub instructions: [Option<String>; 2],
    /// Ids that were compared: up to where answers part.
    pub ids: usize,
    /// Of those, the same.
    pub same: usize,
}

/// Starts one server after the other and compares.
pub async fn check(setup: &Setup) -> Result<Agreement, Problem> {
    let setup = &Setup {
        verbose: true,
        ..setup.clone()
    };
    let mut answers = Vec::new();
    let mut instructions = [None, None];
    for (kind, told) in [Kind::Espalier, Kind::Llama]
        .into_iter()
        .zip(&mut instructions)
    {
        let server = Server::start(setup, kind).await?;
        let mut of_kind = Vec::new();
        for n in 0..PROMPTS {
            let prompt = ids(1 << 60 | n, PROMPT_TOKENS);
            of_kind.push(server.answer(&prompt, ANSWER_TOKENS, LIKELY).await?);
        }
        answers.push(of_kind);
        *told = server.instructions();
        server.end().await?;
    }
    let mut agreement = Agreement {
        instructions,
        ids: 0,
        same: 0,
    };
    let [ours, theirs] = answers.try_into().unwrap_or_default();
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let same = ours.ids.iter().zip(&theirs.ids).take_while(|(a, b)| a == b);
        let same = same.count();
        agreement.same += same;
        agreement.ids += same;
        let Some(id) = ours.ids.get(same) else {
            continue;
        };
        agreement.ids += 1;
        let likely = theirs.likely.get(same).map_or(&[][..], Vec::as_slice);
        if !is_close(*id, likely, margin(setup.form)) {
            return Err(differ(&setup.folder, same, *id, likely));
        }
    }
    Ok(agreement)
}

/// Whether `id` is nearly as likely as the most likely one.
fn is_close(id: u32, likely: &[(u32, f64)], margin: f64) -> bool {
    let best = likely
        .iter()
        .map(|(_, logprob)| *logprob)
        .fold(f64::NEG_INFINITY, f64::max);
    likely
        .iter()
        .any(|(one, logprob)| *one == id && best - logprob <= margin)
}

fn differ(logs: &Path, place: usize, id: u32, likely: &[(u32, f64)]) -> Problem {
    Problem::failed(format!(
        "the servers do not compute the same model: at place {place} ours says {id}, llama.cpp {likely:?}; logs: {}",
        logs.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_nearly_as_likely_is_close() {
        let likely = [(7, -1.0), (8, -1.04), (9, -1.2)];
        assert!(is_close(7, &likely, 0.05) && is_close(8, &likely, 0.05));
        assert!(!is_close(9, &likely, 0.05) && !is_close(1, &likely, 9.0));
        assert!(!is_close(1, &[], 9.0));
    }
}
