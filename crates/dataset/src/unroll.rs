//! Where a conversation is cut into rows, and which assistant turns each row trains. Pure.

use std::fmt;
use std::str::FromStr;

use espalier_core::chat::Message;
use espalier_core::error::FieldError;
use serde::{Deserialize, Serialize};

/// How a conversation becomes rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unroll {
    /// As the workshop cuts: after every assistant turn that follows a user's message directly, and the whole
    /// conversation besides; every assistant turn of a row is trained. Turns come several times, and thoughts before
    /// the last user message never.
    Compat,
    /// One row for each assistant turn, which it trains.
    EveryAssistant,
    /// One row for each message of the user, cut just before the next one; trained are the turns that answer it.
    /// No turn is lost, none comes twice.
    #[default]
    PerUserTurn,
}

impl Unroll {
    const ALL: [Self; 3] = [Self::Compat, Self::EveryAssistant, Self::PerUserTurn];

    /// The name in settings and manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compat => "compat",
            Self::EveryAssistant => "every_assistant",
            Self::PerUserTurn => "per_user_turn",
        }
    }
}

impl fmt::Display for Unroll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Unroll {
    type Err = FieldError;

    fn from_str(name: &str) -> Result<Self, FieldError> {
        let rule = "must be compat, every_assistant or per_user_turn";
        let mode = Self::ALL.into_iter().find(|mode| mode.as_str() == name);
        mode.ok_or_else(|| FieldError::new("unroll", name, rule))
    }
}

/// One row to be: the beginning of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// How many messages it has.
    pub messages: usize,
    /// The assistant turns that are trained, counted from 0 over the conversation; ascending, at least one.
    pub trained: Vec<usize>,
    /// Whether it stands for the whole conversation.
    pub whole: bool,
}

/// The rows of a conversation, shortest first. A turn whose call had malformed arguments is trained nowhere.
pub fn cuts(messages: &[Message], unroll: Unroll) -> Vec<Cut> {
    let turns: Vec<usize> = assistant_turns(messages).collect();
    let is_good = |turn: &usize| !is_malformed(&messages[turns[*turn]]);
    match unroll {
        Unroll::Compat => {
            let mut cuts = compat(messages, &turns);
            for cut in &mut cuts {
                cut.trained.retain(is_good);
            }
            cuts.retain(|cut| !cut.trained.is_empty());
            cuts
        }
        Unroll::EveryAssistant => {
            let each = (0..turns.len()).filter(is_good);
            each.filter_map(|turn| ending(messages, &turns, vec![turn]))
                .collect()
        }
        Unroll::PerUserTurn => per_user_turn(messages, &turns, is_good),
    }
}

/// The row that ends with its last trained turn; none without one.
fn ending(messages: &[Message], turns: &[usize], trained: Vec<usize>) -> Option<Cut> {
    let end = turns[*trained.last()?] + 1;
    Some(Cut {
        messages: end,
        trained,
        whole: end == messages.len(),
    })
}

/// Indices of the assistant messages.
pub fn assistant_turns(messages: &[Message]) -> impl Iterator<Item = usize> {
    let all = messages.iter().enumerate();
    all.filter(|(_, message)| message.role() == "assistant")
        .map(|(at, _)| at)
}

fn compat(messages: &[Message], turns: &[usize]) -> Vec<Cut> {
    let follows_user = |at: usize| at > 0 && messages[at - 1].role() == "user";
    let short = turns
        .iter()
        .enumerate()
        .filter(|(_, at)| follows_user(**at));
    let short = short.map(|(turn, &at)| Cut {
        messages: at + 1,
        trained: (0..=turn).collect(),
        whole: false,
    });
    let whole = Cut {
        messages: messages.len(),
        trained: (0..turns.len()).collect(),
        whole: true,
    };
    short.chain([whole]).collect()
}

fn per_user_turn(
    messages: &[Message],
    turns: &[usize],
    is_good: impl Fn(&usize) -> bool,
) -> Vec<Cut> {
    let asked = messages.iter().enumerate().filter(|(_, m)| is_query(m));
    let asked = asked.map(|(at, _)| at).chain([messages.len()]);
    let (mut cuts, mut done) = (Vec::new(), 0);
    for next in asked {
        let first = done;
        done += turns[first..].iter().take_while(|&&at| at < next).count();
        let trained = (first..done).filter(&is_good).collect();
        cuts.extend(ending(messages, turns, trained));
    }
    cuts
}

/// Whether the template takes the message for a question of the user: results of tools may come as user messages too.
fn is_query(message: &Message) -> bool {
    let Message::User { content } = message else {
        return false;
    };
    !(content.starts_with("<tool_response>") && content.ends_with("</tool_response>"))
}

fn is_malformed(message: &Message) -> bool {
    let Message::Assistant { tool_calls, .. } = message else {
        return false;
    };
    let mut calls = tool_calls.iter();
    calls.any(|call| call.function.malformed.is_some())
}

#[cfg(test)]
mod tests {
    use espalier_core::chat::ToolCall;
    use serde_json::Map;

    use super::*;

    /// `s`ystem, `u`ser, `t`ool, user with a tool's response `r`, `a`ssistant, assistant with a malformed call `m`.
    fn conversation(roles: &str) -> Vec<Message> {
        let message = |role| match role {
            's' => Message::System {
                content: "s".into(),
                hint: false,
            },
            'u' => Message::User {
                content: "u".into(),
            },
            'r' => Message::User {
                content: "<tool_response>r</tool_response>".into(),
            },
            't' => Message::Tool {
                tool_call_id: "c".into(),
                content: "t".into(),
            },
            'm' => {
                let mut call = ToolCall::new("c", "f", Map::new());
                call.function.malformed = Some("{".into());
                Message::assistant(String::new(), None, vec![call])
            }
            _ => Message::assistant("a".into(), None, vec![]),
        };
        roles.chars().map(message).collect()
    }

    /// Each row as its length, the trained turns, and `.` where it is the whole conversation.
    fn shown(roles: &str, unroll: Unroll) -> Vec<String> {
        let cuts = cuts(&conversation(roles), unroll);
        let shown = |cut: &Cut| {
            let end = if cut.whole { "." } else { "" };
            format!("{}{:?}{end}", cut.messages, cut.trained)
        };
        cuts.iter().map(shown).collect()
    }

    #[test]
    fn per_user_turn_cuts_before_the_next_question() {
        let mode = Unroll::PerUserTurn;
        assert_eq!(shown("suatata", mode), ["7[0, 1, 2]."]);
        assert_eq!(shown("uatauataa", mode), ["4[0, 1]", "9[2, 3, 4]."]);
        assert_eq!(shown("aua", mode), ["1[0]", "3[1]."]);
        assert_eq!(shown("uuat", mode), ["3[0]"]);
        assert_eq!(shown("uara", mode), ["4[0, 1]."]);
        assert_eq!(shown("umtau", mode), ["4[1]"]);
        assert_eq!(shown("uatm", mode), ["2[0]"]);
        assert_eq!(shown("su", mode), [""; 0]);
    }

    #[test]
    fn every_assistant_has_a_row_for_each() {
        let mode = Unroll::EveryAssistant;
        assert_eq!(shown("suatau", mode), ["3[0]", "5[1]"]);
        assert_eq!(shown("uamta", mode), ["2[0]", "5[2]."]);
    }

    #[test]
    fn compat_cuts_as_the_workshop_does() {
        let mode = Unroll::Compat;
        assert_eq!(shown("uata", mode), ["2[0]", "4[0, 1]."]);
        assert_eq!(
            shown("suatauata", mode),
            ["3[0]", "7[0, 1, 2]", "9[0, 1, 2, 3]."]
        );
        assert_eq!(shown("ua", mode), ["2[0]", "2[0]."]);
        assert_eq!(shown("aua", mode), ["3[0, 1]", "3[0, 1]."]);
    }

    #[test]
    fn names_are_read_back() {
        for mode in Unroll::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        let error = "all".parse::<Unroll>().unwrap_err().to_string();
        assert_eq!(
            error,
            "`unroll` must be compat, every_assistant or per_user_turn, got `all`"
        );
    }
}
