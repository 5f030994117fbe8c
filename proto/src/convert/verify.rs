//! Trees of checks.

use espalier_core::error::FieldError;
use espalier_core::spec::{
    AnswerDraft, HttpHook, McpCheck, TextRule, ToolCalled, VerifyDraft, WeightedDraft,
};

use super::json;
use crate::v1;
use crate::v1::verifier::Check;

/// Deepest tree that is converted at all; `core` allows less and says so in its own words.
const DEPTH_MAX: usize = 32;

pub fn from_wire(verifier: &v1::Verifier) -> Result<VerifyDraft, FieldError> {
    from_wire_at(verifier, DEPTH_MAX)
}

fn from_wire_at(verifier: &v1::Verifier, depth_left: usize) -> Result<VerifyDraft, FieldError> {
    let depth_left = depth_left
        .checked_sub(1)
        .ok_or_else(|| FieldError::new("", "", "must be at most 8 levels deep"))?;
    let list = |list: &v1::VerifierList, name: &str| {
        let item = |(i, check)| {
            from_wire_at(check, depth_left).map_err(|e| e.under(&format!("{name}[{i}]")))
        };
        list.checks
            .iter()
            .enumerate()
            .map(item)
            .collect::<Result<Vec<_>, _>>()
    };
    match verifier.check.as_ref() {
        None => Err(FieldError::new("", "", "must name a check")),
        Some(Check::Answer(answer)) => Ok(VerifyDraft::Answer(answer_from_wire(answer))),
        Some(Check::Url(rule)) => text_from_wire(rule)
            .map(VerifyDraft::Url)
            .map_err(|e| e.under("url")),
        Some(Check::PageScript(script)) => Ok(VerifyDraft::Page {
            script: script.clone(),
        }),
        Some(Check::ToolCalled(call)) => called_from_wire(call).map_err(|e| e.under("tool_called")),
        Some(Check::Mcp(check)) => mcp_from_wire(check).map_err(|e| e.under("mcp")),
        Some(Check::HttpUrl(url)) => Ok(VerifyDraft::Http(HttpHook { url: url.clone() })),
        Some(Check::All(checks)) => list(checks, "all").map(VerifyDraft::All),
        Some(Check::Any(checks)) => list(checks, "any").map(VerifyDraft::Any),
        Some(Check::Weighted(checks)) => {
            let item = |(i, weighted): (usize, &v1::Weighted)| {
                let check = weighted.check.clone().unwrap_or_default();
                let check = from_wire_at(&check, depth_left)
                    .map_err(|e| e.under(&format!("weighted[{i}]")))?;
                Ok(WeightedDraft {
                    weight: weighted.weight,
                    check,
                })
            };
            let items: Result<Vec<_>, FieldError> =
                checks.checks.iter().enumerate().map(item).collect();
            items.map(VerifyDraft::Weighted)
        }
    }
}

fn answer_from_wire(answer: &v1::AnswerCheck) -> AnswerDraft {
    AnswerDraft {
        equals: answer.equals.as_ref().map(json::from_wire),
        contains: answer.contains.clone(),
        regex: answer.regex.clone(),
        number: answer.number,
        tolerance: answer.tolerance,
        json_path: answer.json_path.clone(),
    }
}

fn text_from_wire(rule: &v1::TextRule) -> Result<TextRule, FieldError> {
    use v1::text_rule::Rule;
    match &rule.rule {
        None => Err(FieldError::new(
            "",
            "",
            "must be one of `equals`, `contains`, `regex`",
        )),
        Some(Rule::Equals(text)) => Ok(TextRule::Equals(text.clone())),
        Some(Rule::Contains(text)) => Ok(TextRule::Contains(text.clone())),
        Some(Rule::Regex(pattern)) => Ok(TextRule::Regex(pattern.clone())),
    }
}

fn called_from_wire(call: &v1::ToolCalledCheck) -> Result<VerifyDraft, FieldError> {
    let argument = |(name, rule): (&String, &v1::TextRule)| {
        let rule = text_from_wire(rule).map_err(|e| e.under(&format!("arguments.{name}")))?;
        Ok((name.clone(), rule))
    };
    let arguments = call
        .arguments
        .iter()
        .map(argument)
        .collect::<Result<_, FieldError>>()?;
    Ok(VerifyDraft::ToolCalled(ToolCalled {
        name: call.name.clone(),
        arguments,
    }))
}

fn mcp_from_wire(check: &v1::McpCheck) -> Result<VerifyDraft, FieldError> {
    let text =
        text_from_wire(&check.text.clone().unwrap_or_default()).map_err(|e| e.under("text"))?;
    Ok(VerifyDraft::Mcp(McpCheck {
        server: check.server.clone(),
        tool: check.tool.clone(),
        arguments: check
            .arguments
            .as_ref()
            .map(json::map_from_wire)
            .unwrap_or_default(),
        resource: check.resource.clone(),
        text,
    }))
}

pub fn to_wire(draft: &VerifyDraft) -> v1::Verifier {
    let list = |checks: &[VerifyDraft]| v1::VerifierList {
        checks: checks.iter().map(to_wire).collect(),
    };
    let check = match draft {
        VerifyDraft::Answer(answer) => Check::Answer(v1::AnswerCheck {
            equals: answer.equals.as_ref().map(json::to_wire),
            contains: answer.contains.clone(),
            regex: answer.regex.clone(),
            number: answer.number,
            tolerance: answer.tolerance,
            json_path: answer.json_path.clone(),
        }),
        VerifyDraft::Url(rule) => Check::Url(text_to_wire(rule)),
        VerifyDraft::Page { script } => Check::PageScript(script.clone()),
        VerifyDraft::ToolCalled(call) => Check::ToolCalled(v1::ToolCalledCheck {
            name: call.name.clone(),
            arguments: call
                .arguments
                .iter()
                .map(|(name, rule)| (name.clone(), text_to_wire(rule)))
                .collect(),
        }),
        VerifyDraft::Mcp(check) => Check::Mcp(v1::McpCheck {
            server: check.server.clone(),
            tool: check.tool.clone(),
            arguments: (!check.arguments.is_empty()).then(|| json::map_to_wire(&check.arguments)),
            resource: check.resource.clone(),
            text: Some(text_to_wire(&check.text)),
        }),
        VerifyDraft::Http(hook) => Check::HttpUrl(hook.url.clone()),
        VerifyDraft::All(checks) => Check::All(list(checks)),
        VerifyDraft::Any(checks) => Check::Any(list(checks)),
        VerifyDraft::Weighted(checks) => {
            let item = |w: &WeightedDraft| v1::Weighted {
                weight: w.weight,
                check: Some(to_wire(&w.check)),
            };
            Check::Weighted(v1::WeightedList {
                checks: checks.iter().map(item).collect(),
            })
        }
    };
    v1::Verifier { check: Some(check) }
}

fn text_to_wire(rule: &TextRule) -> v1::TextRule {
    use v1::text_rule::Rule;
    let rule = match rule.clone() {
        TextRule::Equals(text) => Rule::Equals(text),
        TextRule::Contains(text) => Rule::Contains(text),
        TextRule::Regex(pattern) => Rule::Regex(pattern),
    };
    v1::TextRule { rule: Some(rule) }
}
