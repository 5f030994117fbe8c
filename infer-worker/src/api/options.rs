//! What chat completions and completions have in common: how answers are drawn, when they end, how they are sent.

use serde_json::{Value, json};

use super::backend::{Priority, Sampling};
use super::error::ApiError;
use super::fields::{Fields, Rule, whole};

/// Most answers of one request.
pub(super) const CHOICES_MAX: i64 = 128;
/// Most stop strings.
const STOPS_MAX: usize = 16;
/// Longest stop string, in bytes: as much text may be held back.
const STOP_BYTES_MAX: usize = 1_024;
/// Most stop ids, and most ids with a bias.
const IDS_MAX: usize = 1_024;
/// Most alternatives that log-probabilities come with.
pub(super) const TOP_LOGPROBS_MAX: i64 = 20;

const NOT_NEGATIVE: Rule = Rule {
    words: "must be 0 or more",
    holds: |t| t >= 0.0,
};
const SHARE: Rule = Rule {
    words: "must be above 1e-37 and at most 1",
    holds: |p| p > 1e-37 && p <= 1.0,
};
const UNIT: Rule = Rule {
    words: "must be in [0, 1]",
    holds: |p| (0.0..=1.0).contains(&p),
};
const PENALTY: Rule = Rule {
    words: "must be in [-2, 2]",
    holds: |p| (-2.0..=2.0).contains(&p),
};
const FACTOR: Rule = Rule {
    words: "must be in [0.01, 100]",
    holds: |p| (0.01..=100.0).contains(&p),
};
/// Logits divided by less are out of what numbers can say.
const GREEDY_BELOW: f32 = 1e-5;

/// Checked.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Options {
    /// None: the base model.
    pub(super) model: Option<String>,
    /// Answers to each prompt.
    pub(super) n: usize,
    /// `seed` is not in it yet.
    pub(super) sampling: Sampling,
    pub(super) seed: Option<i64>,
    /// None: as long as the context allows.
    pub(super) tokens_max: Option<usize>,
    pub(super) stops: Vec<String>,
    pub(super) stop_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) return_token_ids: bool,
    pub(super) priority: Priority,
}

impl Options {
    /// Takes its fields; what the request leaves open is as in `defaults`.
    pub(super) fn take(
        fields: &mut Fields,
        defaults: &Sampling,
        vocabulary: u32,
    ) -> Result<Self, ApiError> {
        let at_least_one = "must be a whole number of at least 1";
        let tokens_max = fields.whole("max_tokens", at_least_one, |max| max >= 1)?;
        let newer = fields.whole("max_completion_tokens", at_least_one, |max| max >= 1)?;
        let tokens_max = newer
            .or(tokens_max)
            .map(|max| usize::try_from(max).unwrap_or(usize::MAX));
        let choices = format!("must be a whole number from 1 to {CHOICES_MAX}");
        let n = fields.whole("n", &choices, |n| (1..=CHOICES_MAX).contains(&n))?;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let include_usage = match fields.object("stream_options")? {
            Some(mut options) => options.flag("include_usage")?.unwrap_or(false),
            None => false,
        };
        Ok(Self {
            model: fields.text("model")?,
            n: n.map_or(1, |n| n as usize),
            sampling: sampling(fields, defaults, vocabulary)?,
            seed: fields.whole("seed", "must be a whole number", |_| true)?,
            tokens_max,
            stops: stops(fields)?,
            stop_ids: stop_ids(fields, vocabulary)?,
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            stream,
            include_usage,
            return_token_ids: fields.flag("return_token_ids")?.unwrap_or(false),
            priority: priority(fields)?,
        })
    }

    /// Longest answer to a prompt that leaves `room`.
    pub(super) fn tokens_within(&self, room: usize) -> usize {
        self.tokens_max.unwrap_or(room).min(room)
    }

    /// Whether what an answer would tell of its tokens can be kept until its end: at most `told_max` log-probabilities.
    /// `rooms` are what the prompts leave, `top_field` is the field that asks for alternatives.
    pub(super) fn check_logprobs(
        &self,
        rooms: impl Iterator<Item = usize>,
        top_field: &str,
        told_max: usize,
    ) -> Result<(), ApiError> {
        let Some(top) = self.sampling.logprobs.filter(|_| !self.stream) else {
            return Ok(());
        };
        let tokens = rooms.map(|room| self.tokens_within(room)).sum::<usize>() * self.n;
        let told = tokens * (usize::from(top) + 1);
        if told > told_max {
            let message = format!(
                "`n` × `max_tokens` × (`{top_field}` + 1) must be at most {told_max} where `stream` is not set, \
                 got {told}"
            );
            return Err(ApiError::about(top_field, message));
        }
        Ok(())
    }

    /// The seed of one answer: all differ, and all follow from the request's.
    pub(super) fn seed_of(&self, choice: usize, random: u64) -> u64 {
        let seed = self.seed.map_or(random, |seed| seed as u64);
        seed.wrapping_add(choice as u64)
    }
}

fn sampling(
    fields: &mut Fields,
    defaults: &Sampling,
    vocabulary: u32,
) -> Result<Sampling, ApiError> {
    let top_k = fields.whole("top_k", "must be -1, 0 or a positive whole number", |k| {
        (-1..=i64::from(u32::MAX)).contains(&k)
    })?;
    let or = |value: Option<f32>, default: f32| value.unwrap_or(default);
    let temperature = or(
        fields.number("temperature", NOT_NEGATIVE)?,
        defaults.temperature,
    );
    Ok(Sampling {
        temperature: if temperature < GREEDY_BELOW {
            0.0
        } else {
            temperature
        },
        top_p: or(fields.number("top_p", SHARE)?, defaults.top_p),
        top_k: top_k.map_or(defaults.top_k, |k| u32::try_from(k).unwrap_or(0)),
        min_p: or(fields.number("min_p", UNIT)?, defaults.min_p),
        presence_penalty: or(
            fields.number("presence_penalty", PENALTY)?,
            defaults.presence_penalty,
        ),
        frequency_penalty: or(
            fields.number("frequency_penalty", PENALTY)?,
            defaults.frequency_penalty,
        ),
        repetition_penalty: or(
            fields.number("repetition_penalty", FACTOR)?,
            defaults.repetition_penalty,
        ),
        bias: bias(fields, vocabulary)?,
        seed: 0,
        logprobs: None,
    })
}

/// An object of ids, written as strings, and what is added to their logits.
fn bias(fields: &mut Fields, vocabulary: u32) -> Result<Vec<(u32, f32)>, ApiError> {
    let at = fields.path("logit_bias");
    let Some(bias) = fields.object("logit_bias")? else {
        return Ok(Vec::new());
    };
    let bias = bias.into_rest();
    if bias.len() > IDS_MAX {
        let message = format!(
            "`{at}` must have at most {IDS_MAX} entries, got {}",
            bias.len()
        );
        return Err(ApiError::about(at, message));
    }
    let mut out = Vec::with_capacity(bias.len());
    for (id, value) in bias {
        let known = id.parse().ok().filter(|id: &u32| *id < vocabulary);
        let known = known.ok_or_else(|| {
            let rule = format!("must have token ids below {vocabulary} as keys");
            ApiError::field(&at, &rule, &json!(id))
        })?;
        let amount = value.as_f64().filter(|amount| amount.abs() <= 100.0);
        let amount = amount.ok_or_else(|| {
            ApiError::field(format!("{at}.{id}"), "must be in [-100, 100]", &value)
        })?;
        out.push((known, amount as f32));
    }
    Ok(out)
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let rule = format!(
        "must be a string of 1 to {STOP_BYTES_MAX} bytes, or a list of at most {STOPS_MAX} such strings"
    );
    let at = fields.path("stop");
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= STOPS_MAX => list,
        Some(text @ Value::String(_)) => vec![text],
        Some(other) => return Err(ApiError::field(at, &rule, &other)),
    };
    let stop = |value: Value| match value {
        Value::String(stop) if (1..=STOP_BYTES_MAX).contains(&stop.len()) => Ok(stop),
        other => Err(ApiError::field(&at, &rule, &other)),
    };
    list.into_iter().map(stop).collect()
}

fn stop_ids(fields: &mut Fields, vocabulary: u32) -> Result<Vec<u32>, ApiError> {
    let ids = fields
        .ids("stop_token_ids", vocabulary)?
        .unwrap_or_default();
    if ids.len() > IDS_MAX {
        let message = format!(
            "`stop_token_ids` must have at most {IDS_MAX} entries, got {}",
            ids.len()
        );
        return Err(ApiError::about("stop_token_ids", message));
    }
    Ok(ids)
}

/// As at vLLM, 0 is the usual one and higher numbers come later.
fn priority(fields: &mut Fields) -> Result<Priority, ApiError> {
    let priority = fields.whole("priority", "must be a whole number", |_| true)?;
    Ok(match priority {
        Some(1..) => Priority::Batch,
        _ => Priority::Online,
    })
}

/// `logprobs: true` with `top_logprobs`, as chat completions have it.
pub(super) fn chat_logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let rule = format!("must be a whole number from 0 to {TOP_LOGPROBS_MAX}");
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", &rule, |top| {
        (0..=TOP_LOGPROBS_MAX).contains(&top)
    })?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u8)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(top)) => {
            let rule = "needs `logprobs` to be true";
            Err(ApiError::field("top_logprobs", rule, &json!(top)))
        }
    }
}

/// `logprobs: 5`, as completions have it.
pub(super) fn completion_logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let at = fields.path("logprobs");
    let Some(value) = fields.take("logprobs") else {
        return Ok(None);
    };
    if value == Value::Bool(false) {
        return Ok(None);
    }
    let top = whole(&value).filter(|top| (0..=TOP_LOGPROBS_MAX).contains(top));
    match top {
        Some(top) => Ok(Some(top as u8)),
        None => {
            let rule = format!("must be a whole number from 0 to {TOP_LOGPROBS_MAX}");
            Err(ApiError::field(at, &rule, &value))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::limits::LOGPROBS_MAX;
    use super::*;

    pub(crate) fn defaults() -> Sampling {
        Sampling {
            temperature: 0.6,
            top_p: 0.95,
            top_k: 20,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }

    fn read(body: &Value) -> Result<Options, ApiError> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        Options::take(&mut fields, &defaults(), 1_000)
    }

    #[test]
    fn what_is_left_open_is_the_models() {
        let options = read(&json!({"temperature": null, "top_p": 1})).unwrap();
        let expected = Sampling {
            top_p: 1.0,
            ..defaults()
        };
        assert_eq!(options.sampling, expected);
        assert_eq!(
            (options.n, options.tokens_max, options.stream),
            (1, None, false)
        );
    }

    #[test]
    fn temperatures_too_low_to_divide_by_are_greedy() {
        for (given, taken) in [(1e-50, 0.0), (1e-39, 0.0), (9e-6, 0.0), (0.01, 0.01)] {
            let options = read(&json!({"temperature": given})).unwrap();
            assert_eq!(options.sampling.temperature, taken);
        }
    }

    #[test]
    fn every_field_is_read() {
        let options = read(&json!({
            "model": "m", "n": 2, "temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": -7,
            "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1,
            "max_tokens": 4, "max_completion_tokens": 5, "stop": ["a", "b"], "stop_token_ids": [9],
            "logit_bias": {"7": -100}, "ignore_eos": true, "stream": true,
            "stream_options": {"include_usage": true}, "return_token_ids": true, "priority": 1,
        })).unwrap();
        let sampling = Sampling {
            temperature: 0.0,
            top_p: 0.5,
            top_k: 0,
            min_p: 0.1,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            repetition_penalty: 1.1,
            bias: vec![(7, -100.0)],
            ..defaults()
        };
        assert_eq!(options.sampling, sampling);
        assert_eq!(
            (options.n, options.tokens_max, options.seed),
            (2, Some(5), Some(-7))
        );
        assert_eq!((options.stops.len(), &options.stop_ids[..]), (2, &[9][..]));
        assert_eq!(options.priority, Priority::Batch);
        assert!(
            options.ignore_eos
                && options.stream
                && options.include_usage
                && options.return_token_ids
        );
        assert_ne!(options.seed_of(0, 1), options.seed_of(1, 1));
        assert_eq!(read(&json!({"stop": "x"})).unwrap().stops, ["x"]);
    }

    #[test]
    fn log_probabilities_that_must_be_kept_are_bounded() {
        let check = |body: &Value, top, rooms: &[usize]| {
            let mut options = read(body).unwrap();
            options.sampling.logprobs = top;
            options.check_logprobs(rooms.iter().copied(), "top_logprobs", LOGPROBS_MAX)
        };
        let large = json!({"n": 128, "max_tokens": 2_048});
        let error = check(&large, Some(20), &[40_000]).unwrap_err();
        assert_eq!(error.param(), Some("top_logprobs"));
        assert_eq!(
            error.to_string(),
            "`n` × `max_tokens` × (`top_logprobs` + 1) must be at most 4194304 where `stream` is not set, got 5505024"
        );
        for (body, top, rooms) in [
            (&large, None, &[40_000][..]),
            (&large, Some(0), &[40_000]),
            (&large, Some(20), &[1_500]),
            (&json!({"n": 128, "stream": true}), Some(20), &[40_000]),
            (&json!({"n": 4}), Some(20), &[40_000]),
        ] {
            assert_eq!(check(body, top, rooms), Ok(()), "{body}");
        }
        assert!(check(&json!({"n": 4}), Some(20), &[40_000, 40_000]).is_err());
    }

    #[test]
    fn values_beyond_their_rule_are_refused_by_name() {
        for (body, param) in [
            (json!({"temperature": -0.1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"temperature": 1e300}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_p": 1.7}), "top_p"),
            (json!({"top_p": 1e-50}), "top_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"min_p": 2}), "min_p"),
            (json!({"presence_penalty": 3}), "presence_penalty"),
            (json!({"frequency_penalty": -3}), "frequency_penalty"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"repetition_penalty": 1e-50}), "repetition_penalty"),
            (json!({"repetition_penalty": 101}), "repetition_penalty"),
            (json!({"max_tokens": -5}), "max_tokens"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (
                json!({"max_completion_tokens": 1.5}),
                "max_completion_tokens",
            ),
            (json!({"n": 0}), "n"),
            (json!({"n": 129}), "n"),
            (json!({"seed": "a"}), "seed"),
            (json!({"stop": ""}), "stop"),
            (json!({"stop": [1]}), "stop"),
            (json!({"stop": vec!["a"; 17]}), "stop"),
            (json!({"stop_token_ids": [1_000]}), "stop_token_ids[0]"),
            (json!({"logit_bias": {"1000": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
            (json!({"logit_bias": [1]}), "logit_bias"),
            (json!({"stream": "yes"}), "stream"),
            (
                json!({"stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
            ),
            (json!({"model": 3}), "model"),
        ] {
            let error = read(&body).unwrap_err();
            assert_eq!(error.param(), Some(param), "{body}: {error}");
        }
    }
}
