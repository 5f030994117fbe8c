//! The prompts of a trace, each told as a change to an earlier one: how a change is found, and how the whole prompt is
//! got back from it. Pure. The rollout loop tells; whoever trains on traces reads.

use super::{ModelCall, PromptTokens};

/// Most tokens that all calls of one trace may have when their prompts are told in full: 2,000 turns at the longest
/// context are fewer. A trace of a few kilobytes must not unpack to all memory.
const TOKENS_MAX: usize = 256 << 20;

/// Why prompts cannot be told in full.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// A prompt extends one that is not there.
    #[error(
        "`model_calls[{call}].prompt.extends` must be an earlier call with a prompt, got {extends}"
    )]
    NotEarlier {
        /// Index of the call.
        call: usize,
        /// What it names.
        extends: usize,
    },
    /// A prompt keeps more than there is.
    #[error("`model_calls[{call}].prompt.keep` must be at most {most}, got {keep}")]
    KeepsTooMuch {
        /// Index of the call.
        call: usize,
        /// What it names.
        keep: usize,
        /// Tokens of the earlier prompt and its completion.
        most: usize,
    },
    /// All prompts together are too long.
    #[error("the prompts of a trace must have at most {TOKENS_MAX} tokens together")]
    TooLong,
}

impl PromptTokens {
    /// `ids` as a change to `earlier`: the index of a call, and its prompt followed by its completion.
    pub fn tell(ids: &[u32], earlier: Option<(usize, &[u32])>) -> Self {
        let Some((call, known)) = earlier else {
            return Self {
                extends: None,
                keep: 0,
                append: ids.to_vec(),
            };
        };
        let keep = ids.iter().zip(known).take_while(|(a, b)| a == b).count();
        Self {
            extends: Some(call),
            keep,
            append: ids[keep..].to_vec(),
        }
    }
}

/// The token ids of every call's prompt, in full; none where a call recorded none.
///
/// # Errors
/// A prompt is told as a change to something that is not there.
pub fn prompt_ids(calls: &[ModelCall]) -> Result<Vec<Option<Vec<u32>>>, PromptError> {
    let mut prompts: Vec<Option<Vec<u32>>> = Vec::with_capacity(calls.len());
    let mut tokens = 0_usize;
    for (call, record) in calls.iter().enumerate() {
        let Some(told) = &record.prompt else {
            prompts.push(None);
            continue;
        };
        tokens = tokens
            .saturating_add(told.keep)
            .saturating_add(told.append.len());
        if tokens > TOKENS_MAX {
            return Err(PromptError::TooLong);
        }
        let mut ids = match told.extends {
            Some(extends) => kept(call, extends, told.keep, calls, &prompts)?,
            None if told.keep > 0 => {
                let (keep, most) = (told.keep, 0);
                return Err(PromptError::KeepsTooMuch { call, keep, most });
            }
            None => Vec::new(),
        };
        ids.extend_from_slice(&told.append);
        prompts.push(Some(ids));
    }
    Ok(prompts)
}

/// The first `keep` tokens of an earlier prompt with its completion.
fn kept(
    call: usize,
    extends: usize,
    keep: usize,
    calls: &[ModelCall],
    prompts: &[Option<Vec<u32>>],
) -> Result<Vec<u32>, PromptError> {
    let Some(Some(prompt)) = prompts.get(extends) else {
        return Err(PromptError::NotEarlier { call, extends });
    };
    let completion = calls[extends].completion_ids.as_deref().unwrap_or_default();
    let most = prompt.len() + completion.len();
    if keep > most {
        return Err(PromptError::KeepsTooMuch { call, keep, most });
    }
    Ok(prompt
        .iter()
        .chain(completion)
        .take(keep)
        .copied()
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(prompt: Option<PromptTokens>, completion: &[u32]) -> ModelCall {
        ModelCall {
            prompt,
            completion_ids: Some(completion.to_vec()),
            ..ModelCall::default()
        }
    }

    fn told(extends: usize, keep: usize, append: &[u32]) -> Option<PromptTokens> {
        Some(PromptTokens {
            extends: Some(extends),
            keep,
            append: append.to_vec(),
        })
    }

    #[test]
    fn what_is_told_by_difference_is_got_back() {
        let first = call(Some(PromptTokens::tell(&[1, 2], None)), &[3, 4]);
        let earlier = [1, 2, 3, 4];
        let second = PromptTokens::tell(&[1, 2, 3, 9, 9], Some((0, &earlier)));
        assert_eq!(Some(&second), told(0, 3, &[9, 9]).as_ref());
        let second = call(Some(second), &[7]);
        let silent = call(None, &[]);
        let earlier = [1, 2, 3, 9, 9, 7];
        let last = call(Some(PromptTokens::tell(&[1], Some((1, &earlier)))), &[]);
        let prompts = prompt_ids(&[first, second, silent, last]).unwrap();
        let expected = [
            Some(vec![1, 2]),
            Some(vec![1, 2, 3, 9, 9]),
            None,
            Some(vec![1]),
        ];
        assert_eq!(prompts, expected);
    }

    #[test]
    fn a_change_to_what_is_not_there_is_refused() {
        let first = || call(Some(PromptTokens::tell(&[1], None)), &[2]);
        let itself = prompt_ids(&[first(), call(told(1, 0, &[]), &[])]);
        let expected = PromptError::NotEarlier {
            call: 1,
            extends: 1,
        };
        assert_eq!(itself, Err(expected));
        let more = prompt_ids(&[first(), call(told(0, 3, &[]), &[])]);
        let (call_index, keep, most) = (1, 3, 2);
        let expected = PromptError::KeepsTooMuch {
            call: call_index,
            keep,
            most,
        };
        assert_eq!(more, Err(expected));
        let mut growing = vec![first()];
        growing.extend((0..40).map(|n| call(told(n, usize::MAX / 2, &[]), &[])));
        assert_eq!(prompt_ids(&growing), Err(PromptError::TooLong));
    }
}
