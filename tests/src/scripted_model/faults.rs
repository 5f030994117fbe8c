//! Faults that a test can order: what a model endpoint does when it misbehaves.
//!
//! Two ways to order one. `POST /control {"fault": "http500", "times": 3}` holds for the next requests of anyone; a
//! prompt line `FAULT: http500 times=3` for the next requests with that very prompt. `times` is 1 unless given,
//! `times=always` never ends; `delay_ms` is for `slow`. This decides which fault is due; the HTTP layer commits it.

use std::collections::HashMap;
use std::str::FromStr;

use espalier_practice::draw::hash;
use serde_json::Value;

/// Prompts whose faults are counted; beyond that the counts begin anew, which a test run never reaches.
const PROMPTS_MAX: usize = 4096;
/// How long `slow` takes unless told otherwise.
const SLOW_DELAY_MS: u64 = 2_000;

/// A way to misbehave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Answers late.
    Slow,
    /// Closes the connection in the middle of the answer.
    Cut,
    /// Answers 500.
    Http500,
    /// Answers 429 with `Retry-After: 1`.
    Http429,
    /// Answers 200 with a web page.
    Html,
    /// Answers without a choice.
    EmptyChoices,
    /// Calls a tool with arguments that are no JSON.
    BadArguments,
    /// Calls a tool that was not offered.
    UnknownTool,
    /// Runs into the token limit in the middle of a tool call.
    UnclosedToolCall,
    /// Accepts the request and never answers.
    Hang,
    /// Sends the thought as `reasoning` instead of `reasoning_content`.
    ReasoningField,
}

impl Fault {
    const ALL: [(&str, Fault); 11] = [
        ("slow", Fault::Slow),
        ("cut", Fault::Cut),
        ("http500", Fault::Http500),
        ("http429", Fault::Http429),
        ("html", Fault::Html),
        ("empty_choices", Fault::EmptyChoices),
        ("bad_arguments", Fault::BadArguments),
        ("unknown_tool", Fault::UnknownTool),
        ("unclosed_tool_call", Fault::UnclosedToolCall),
        ("hang", Fault::Hang),
        ("reasoning_field", Fault::ReasoningField),
    ];
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .find(|(name, _)| *name == text)
            .map(|(_, fault)| *fault)
            .ok_or_else(|| {
                let names: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
                format!("`fault` must be one of {}, got {text}", names.join(", "))
            })
    }
}

/// A fault that is ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// What goes wrong.
    pub fault: Fault,
    /// For how many requests; `None` for all.
    pub times: Option<u32>,
    /// How long `slow` takes.
    pub delay_ms: u64,
}

impl Order {
    /// Reads the body of `/control`.
    pub(super) fn from_json(body: &Value) -> Result<Self, String> {
        let fault = body["fault"].as_str().unwrap_or_default().parse()?;
        let times = match &body["times"] {
            Value::Null => Some(1),
            Value::String(text) if text == "always" => None,
            Value::Number(n) if n.as_u64().is_some_and(|n| n <= u64::from(u32::MAX)) => {
                n.as_u64().and_then(|n| u32::try_from(n).ok())
            }
            other => return Err(format!("`times` must be a count or always, got {other}")),
        };
        Ok(Self {
            fault,
            times,
            delay_ms: body["delay_ms"].as_u64().unwrap_or(SLOW_DELAY_MS),
        })
    }

    /// Reads the `FAULT:` line of a prompt; a line that cannot be read orders nothing.
    pub(super) fn from_prompt(prompt: &str) -> Option<Self> {
        let line = prompt
            .lines()
            .find_map(|line| line.trim().strip_prefix("FAULT:"))?;
        let mut words = line.split_whitespace();
        let mut order = Self {
            fault: words.next()?.parse().ok()?,
            times: Some(1),
            delay_ms: SLOW_DELAY_MS,
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "times" if value == "always" => order.times = None,
                "times" => order.times = Some(value.parse().ok()?),
                "delay_ms" => order.delay_ms = value.parse().ok()?,
                _ => return None,
            }
        }
        Some(order)
    }
}

/// Which faults are still due.
#[derive(Debug, Default)]
pub(super) struct Orders {
    ordered: Option<Order>,
    used: HashMap<u64, u32>,
}

impl Orders {
    /// Orders a fault for the next requests, in place of the one before; `None` takes it back.
    pub(super) fn set(&mut self, order: Option<Order>) {
        self.ordered = order;
    }

    /// The fault that a request with `prompt` meets; counts it as committed.
    pub(super) fn due(&mut self, prompt: &str) -> Option<Order> {
        if let Some(order) = self.ordered {
            self.ordered = match order.times {
                Some(times) if times <= 1 => None,
                Some(times) => Some(Order {
                    times: Some(times - 1),
                    ..order
                }),
                None => Some(order),
            };
            return (order.times != Some(0)).then_some(order);
        }
        let order = Order::from_prompt(prompt)?;
        if self.used.len() >= PROMPTS_MAX {
            self.used.clear();
        }
        let used = self.used.entry(hash(0, prompt)).or_default();
        if order.times.is_some_and(|times| *used >= times) {
            return None;
        }
        *used += 1;
        Some(order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_prompt_line_orders_a_fault_for_that_prompt_only() {
        let mut orders = Orders::default();
        let prompt = "Do it.\nFAULT: http500 times=2\nSCRIPT: []";
        assert_eq!(orders.due(prompt).map(|o| o.fault), Some(Fault::Http500));
        assert_eq!(orders.due("Do it."), None);
        assert!(orders.due(prompt).is_some());
        assert_eq!(orders.due(prompt), None);
        let other = "FAULT: slow times=always delay_ms=5";
        for _ in 0..3 {
            assert_eq!(orders.due(other).map(|o| o.delay_ms), Some(5));
        }
    }

    #[test]
    fn an_order_over_control_holds_for_anyone_and_runs_out() {
        let mut orders = Orders::default();
        let order = Order::from_json(&json!({"fault": "html", "times": 2})).unwrap();
        orders.set(Some(order));
        assert!(orders.due("a").is_some() && orders.due("b").is_some());
        assert_eq!(orders.due("c"), None);
        orders.set(Some(
            Order::from_json(&json!({"fault": "cut", "times": "always"})).unwrap(),
        ));
        assert!((0..5).all(|_| orders.due("a").is_some()));
        orders.set(None);
        assert_eq!(orders.due("a"), None);
    }

    #[test]
    fn an_unknown_fault_names_the_known_ones() {
        let error = Order::from_json(&json!({"fault": "flood"})).unwrap_err();
        assert!(error.starts_with("`fault` must be one of slow, cut"));
        assert!(error.ends_with("got flood"));
        assert!(Order::from_json(&json!({"fault": "cut", "times": -1})).is_err());
        assert_eq!(Order::from_prompt("FAULT: flood"), None);
    }
}
