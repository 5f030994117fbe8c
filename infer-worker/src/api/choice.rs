//! One answer on its way from ids to what clients see. Pure: events in, pieces out.

use super::backend::{CallError, Delta, Ended, Parser, Token};
use super::stop::StopText;

/// What a client is told next of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Reasoning(String),
    Content(String),
    /// A call begins.
    Call {
        index: usize,
        name: String,
    },
    /// More of its arguments.
    Arguments {
        index: usize,
        text: String,
    },
}

/// Why an answer ended, as clients are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    Stop,
    Length,
    ToolCalls,
}

impl Finish {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// Which text stop strings are looked for in: they do not reach from thoughts into content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Channel {
    Reasoning,
    Content,
}

/// An answer that runs.
pub(super) struct Choice {
    parser: Box<dyn Parser>,
    stop: StopText,
    channel: Channel,
    /// The answer ends after its first call.
    one_call: bool,
    calls: usize,
    /// What came of the call that is under way.
    call: Call,
    finish: Option<Finish>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Call {
    named: bool,
    has_arguments: bool,
}

impl Choice {
    pub(super) fn new(parser: Box<dyn Parser>, stops: &[String], one_call: bool) -> Self {
        Self {
            parser,
            stop: StopText::new(stops),
            channel: Channel::Content,
            one_call,
            calls: 0,
            call: Call::default(),
            finish: None,
        }
    }

    /// Why the answer ended here: by a stop string, or by its one call. What generates it may be dropped then.
    pub(super) fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// The next id. After a finish nothing comes out, and nothing of an id that only ends the answer.
    pub(super) fn push(&mut self, token: &Token) -> Vec<Piece> {
        if self.finish.is_some() || token.ends {
            return Vec::new();
        }
        let deltas = self.parser.push(token.id);
        self.take(deltas)
    }

    /// The engine ended the answer.
    pub(super) fn end(&mut self, ended: Ended) -> Vec<Piece> {
        let mut pieces = Vec::new();
        if self.finish.is_none() {
            let deltas = self.parser.finish();
            pieces = self.take(deltas);
        }
        if self.finish.is_none() {
            self.release(&mut pieces);
        }
        self.finish.get_or_insert(match ended {
            Ended::Length => Finish::Length,
            _ if self.calls > 0 => Finish::ToolCalls,
            _ => Finish::Stop,
        });
        pieces
    }

    fn take(&mut self, deltas: Vec<Delta>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => self.text(Channel::Reasoning, &text, &mut pieces),
                Delta::Content(text) => self.text(Channel::Content, &text, &mut pieces),
                Delta::ToolCall { index, name } => {
                    self.release(&mut pieces);
                    self.calls += 1;
                    self.call.named = true;
                    pieces.push(Piece::Call { index, name });
                }
                Delta::ToolArguments { index, text } => {
                    self.call.has_arguments = true;
                    pieces.push(Piece::Arguments { index, text })
                }
                Delta::ToolCallDone { index, error } => self.end_call(index, error, &mut pieces),
            }
            if self.finish.is_some() {
                break;
            }
        }
        pieces
    }

    /// A call that is none is told as far as it went, in the model's words, as vLLM does: whoever asked can show them to
    /// the model. Where even the name is missing, they are content.
    fn end_call(&mut self, index: usize, error: Option<CallError>, pieces: &mut Vec<Piece>) {
        let call = std::mem::take(&mut self.call);
        // A call that the end of the answer cut off was not made: why the answer ended is the engine's to say.
        let unfinished = error.as_ref().is_some_and(|error| error.unfinished);
        match error {
            Some(error) if !call.named => {
                let close = if error.unfinished { "" } else { "</tool_call>" };
                let text = format!("<tool_call>{}{close}", error.text);
                return self.text(Channel::Content, &text, pieces);
            }
            Some(error) if !call.has_arguments => pieces.push(Piece::Arguments {
                index,
                text: error.text,
            }),
            _ => {}
        }
        if self.one_call && !unfinished {
            self.finish = Some(Finish::ToolCalls);
        }
    }

    fn text(&mut self, channel: Channel, text: &str, pieces: &mut Vec<Piece>) {
        if channel != self.channel {
            self.release(pieces);
            self.channel = channel;
        }
        let shown = self.stop.push(text);
        push_text(channel, shown.text, pieces);
        if shown.stopped {
            self.finish = Some(Finish::Stop);
        }
    }

    /// Shows what only looked like the start of a stop string.
    fn release(&mut self, pieces: &mut Vec<Piece>) {
        let text = self.stop.finish();
        push_text(self.channel, text, pieces);
    }
}

fn push_text(channel: Channel, text: String, pieces: &mut Vec<Piece>) {
    if text.is_empty() {
        return;
    }
    pieces.push(match channel {
        Channel::Reasoning => Piece::Reasoning(text),
        Channel::Content => Piece::Content(text),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives the deltas of a list, one entry an id and the last one at the end.
    struct Script(Vec<Vec<Delta>>);

    impl Parser for Script {
        fn push(&mut self, id: u32) -> Vec<Delta> {
            std::mem::take(&mut self.0[id as usize])
        }
        fn finish(&mut self) -> Vec<Delta> {
            self.0.pop().unwrap_or_default()
        }
    }

    fn run(
        script: Vec<Vec<Delta>>,
        stops: &[&str],
        one_call: bool,
        ended: Ended,
    ) -> (Vec<Piece>, Option<Finish>) {
        run_to_end(script, vec![], stops, one_call, ended)
    }

    /// With what the parser still has at the end.
    fn run_to_end(
        mut script: Vec<Vec<Delta>>,
        at_end: Vec<Delta>,
        stops: &[&str],
        one_call: bool,
        ended: Ended,
    ) -> (Vec<Piece>, Option<Finish>) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let ids = script.len() as u32;
        script.push(at_end);
        let mut choice = Choice::new(Box::new(Script(script)), &stops, one_call);
        let mut pieces = Vec::new();
        for id in 0..ids {
            let token = Token {
                id,
                logprob: 0.0,
                top: Vec::new(),
                ends: false,
                cached_tokens: 0,
            };
            pieces.extend(choice.push(&token));
        }
        pieces.extend(choice.end(ended));
        (pieces, choice.finish())
    }

    fn content(text: &str) -> Delta {
        Delta::Content(text.to_owned())
    }

    fn call(index: usize) -> Vec<Delta> {
        let text = "{}".to_owned();
        let name = "f".to_owned();
        vec![
            Delta::ToolCall { index, name },
            Delta::ToolArguments { index, text },
            Delta::ToolCallDone { index, error: None },
        ]
    }

    /// A call that broke off, and what it had given before.
    fn broken(before: Vec<Delta>, text: &str) -> Vec<Delta> {
        let error = CallError {
            reason: "it is no JSON".to_owned(),
            text: text.to_owned(),
            unfinished: false,
        };
        let done = Delta::ToolCallDone {
            index: 0,
            error: Some(error),
        };
        before.into_iter().chain([done]).collect()
    }

    #[test]
    fn a_stop_string_ends_the_answer_before_it() {
        let script = vec![
            vec![content("a E")],
            vec![content("ND b")],
            vec![content("c")],
        ];
        let (pieces, finish) = run(script, &["END"], false, Ended::Length);
        assert_eq!(pieces, [Piece::Content("a ".to_owned())]);
        assert_eq!(finish, Some(Finish::Stop));
    }

    #[test]
    fn what_is_held_back_comes_before_what_follows() {
        let script = vec![
            vec![Delta::Reasoning("hm E".to_owned())],
            vec![content("ND")],
            call(0),
        ];
        let (pieces, finish) = run(script, &["END"], false, Ended::Stop);
        let call = Piece::Call {
            index: 0,
            name: "f".to_owned(),
        };
        let arguments = Piece::Arguments {
            index: 0,
            text: "{}".to_owned(),
        };
        let reasoning = |text: &str| Piece::Reasoning(text.to_owned());
        assert_eq!(
            pieces,
            [
                reasoning("hm "),
                reasoning("E"),
                Piece::Content("ND".to_owned()),
                call,
                arguments
            ]
        );
        assert_eq!(finish, Some(Finish::ToolCalls));
    }

    #[test]
    fn one_call_is_one_call() {
        let (pieces, finish) = run(vec![call(0), call(1)], &[], true, Ended::Length);
        assert_eq!((pieces.len(), finish), (2, Some(Finish::ToolCalls)));
        let (pieces, finish) = run(vec![call(0), call(1)], &[], false, Ended::Stop);
        assert_eq!((pieces.len(), finish), (4, Some(Finish::ToolCalls)));
    }

    #[test]
    fn a_broken_call_is_told_in_the_models_words() {
        let call = Piece::Call {
            index: 0,
            name: "f".to_owned(),
        };
        let arguments = |text: &str| Piece::Arguments {
            index: 0,
            text: text.to_owned(),
        };
        let name = || Delta::ToolCall {
            index: 0,
            name: "f".to_owned(),
        };
        let some = Delta::ToolArguments {
            index: 0,
            text: "{\"a\":".to_owned(),
        };
        let script = vec![broken(vec![name()], "{\"name\": \"f\"")];
        let (pieces, finish) = run(script, &[], true, Ended::Stop);
        assert_eq!(pieces, [call.clone(), arguments("{\"name\": \"f\"")]);
        assert_eq!(finish, Some(Finish::ToolCalls));
        let script = vec![broken(vec![name(), some], "all of it")];
        let (pieces, _) = run(script, &[], true, Ended::Stop);
        assert_eq!(pieces, [call, arguments("{\"a\":")]);
        let (pieces, finish) = run(vec![broken(vec![], "\nno\n")], &[], true, Ended::Stop);
        let text = "<tool_call>\nno\n</tool_call>".to_owned();
        assert_eq!(pieces, [Piece::Content(text)]);
        assert_eq!(finish, Some(Finish::Stop));
    }

    #[test]
    fn a_call_that_is_cut_off_does_not_count_as_one_that_ended_the_answer() {
        let cut = || {
            let name = "f".to_owned();
            let mut deltas = broken(vec![Delta::ToolCall { index: 0, name }], "{\"na");
            if let Some(Delta::ToolCallDone { error, .. }) = deltas.last_mut() {
                error.as_mut().unwrap().unfinished = true;
            }
            deltas
        };
        for (one_call, ended, finish) in [
            (true, Ended::Length, Finish::Length),
            (false, Ended::Length, Finish::Length),
            (true, Ended::Stop, Finish::ToolCalls),
        ] {
            let (pieces, found) = run_to_end(vec![vec![]], cut(), &[], one_call, ended);
            assert_eq!((pieces.len(), found), (2, Some(finish)));
        }
    }

    #[test]
    fn an_id_that_ends_the_answer_has_no_text() {
        let script = Script(vec![vec![content("x")], vec![]]);
        let mut choice = Choice::new(Box::new(script), &[], false);
        let token = Token {
            id: 0,
            logprob: 0.0,
            top: Vec::new(),
            ends: true,
            cached_tokens: 0,
        };
        assert_eq!(choice.push(&token), []);
        assert_eq!(choice.end(Ended::Stop), []);
        assert_eq!(choice.finish(), Some(Finish::Stop));
    }

    #[test]
    fn too_long_is_told_also_when_there_were_calls() {
        assert_eq!(
            run(vec![call(0)], &[], false, Ended::Length).1,
            Some(Finish::Length)
        );
        let (pieces, finish) = run(vec![vec![content("a E")]], &["END"], false, Ended::Length);
        assert_eq!(pieces.len(), 2, "what was held back is shown at the end");
        assert_eq!(finish, Some(Finish::Length));
    }
}
