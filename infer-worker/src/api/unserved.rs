//! Fields of other servers that would change the answer and mean nothing here: who sends one is told, because an answer
//! without it would look like one with it. Those that change nothing are named in a header only.

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// The one value that asks for nothing beyond what is served. Null always does.
#[derive(Clone, Copy)]
enum Only {
    Null,
    False,
    True,
    Zero,
    Empty,
}

impl Only {
    fn words(self) -> &'static str {
        match self {
            Self::Null => "is not served",
            Self::False => "must be false, as nothing else is served",
            Self::True => "must be true, as nothing else is served",
            Self::Zero => "must be 0, as nothing else is served",
            Self::Empty => "must be empty, as nothing else is served",
        }
    }

    fn is(self, value: &Value) -> bool {
        match self {
            Self::Null => false,
            Self::False => *value == json!(false),
            Self::True => *value == json!(true),
            Self::Zero => value.as_f64() == Some(0.0),
            Self::Empty => value.as_array().is_some_and(Vec::is_empty),
        }
    }
}

const UNSERVED: [(&str, Only); 22] = [
    ("add_generation_prompt", Only::True),
    ("allowed_token_ids", Only::Null),
    ("bad_words", Only::Empty),
    ("cache_salt", Only::Null),
    ("chat_template", Only::Null),
    ("continue_final_message", Only::False),
    ("echo", Only::False),
    ("function_call", Only::Null),
    ("functions", Only::Empty),
    ("guided_choice", Only::Null),
    ("guided_grammar", Only::Null),
    ("guided_regex", Only::Null),
    ("include_stop_str_in_output", Only::False),
    ("logits_processors", Only::Empty),
    ("min_tokens", Only::Zero),
    ("prompt_embeds", Only::Null),
    ("prompt_logprobs", Only::Null),
    ("skip_special_tokens", Only::True),
    ("structural_tag", Only::Null),
    ("truncate_prompt_tokens", Only::Null),
    ("use_beam_search", Only::False),
    ("vllm_xargs", Only::Null),
];

/// Takes them; refuses the first that asks for what is not served.
pub(super) fn refuse(fields: &mut Fields) -> Result<(), ApiError> {
    for (name, only) in UNSERVED {
        match fields.take(name) {
            Some(value) if !only.is(&value) => {
                return Err(ApiError::field(fields.path(name), only.words(), &value));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, value: &Value) -> Result<String, ApiError> {
        let body = json!({name: value}).to_string();
        let mut fields = Fields::parse(body.as_bytes())?;
        refuse(&mut fields).map(|()| fields.ignored())
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name() {
        for (name, _) in UNSERVED {
            let error = read(name, &json!("x")).unwrap_err();
            assert_eq!(error.param(), Some(name));
            assert_eq!(read(name, &Value::Null), Ok(String::new()));
        }
        let error = read("min_tokens", &json!(5)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`min_tokens` must be 0, as nothing else is served, got 5"
        );
    }

    #[test]
    fn what_asks_for_nothing_passes() {
        for (name, value) in [
            ("min_tokens", json!(0)),
            ("bad_words", json!([])),
            ("echo", json!(false)),
            ("skip_special_tokens", json!(true)),
        ] {
            assert_eq!(read(name, &value), Ok(String::new()), "{name}");
        }
        assert_eq!(read("user", &json!("u")), Ok("user".to_owned()));
    }
}
