//! Spoils a share of the turns, as a model errs: wrong clicks, bad JSON, unknown tools, rambling, wrong answers.
//!
//! A pure function of the model's seed, the prompt, the turn and the sampling seed, so a rerun errs in the same place
//! and another sample elsewhere. Nothing here breaks the protocol; that is the faults' business.
//!
//! One server plays models of different skill: a model that is asked for as `scripted:0.6` errs in that share of its
//! turns, also in those of a script.

use espalier_practice::draw::Draw;
use serde_json::json;

use super::Config;
use super::chat::{Call, Reply, Request};
use super::history::{View, view};

/// `reply` as the model of `config` gives it: usually as it is.
pub(super) fn spoil(config: &Config, request: &Request, reply: Reply) -> Reply {
    let label = format!(
        "{}|{}|{}",
        without_origin(request.prompt()),
        request.turn(),
        request.seed
    );
    let mut draw = Draw::new(config.seed, &label);
    let share = draw.between(0, 999_999) as f64 / 1_000_000.0;
    if share >= named_share(&request.model).unwrap_or(config.mistakes) {
        return reply;
    }
    if reply.calls.is_empty() {
        return spoil_answer(&mut draw, request, reply);
    }
    match draw.between(0, 4) {
        0 => wrong_click(&mut draw, request, reply),
        1 => bad_json(reply),
        2 => unknown_tool(reply),
        3 => look_at_once(request, reply),
        _ => ramble(reply),
    }
}

/// The share of mistakes in a model's name.
pub(super) fn named_share(model: &str) -> Option<f64> {
    let (_, share) = model.rsplit_once(':')?;
    let share = share.parse().ok();
    share.filter(|share| (0.0..=1.0).contains(share))
}

fn spoil_answer(draw: &mut Draw, request: &Request, reply: Reply) -> Reply {
    match draw.between(0, 2) {
        0 => Reply {
            content: wrong_answer(&reply.content),
            ..reply
        },
        1 if request
            .tools
            .iter()
            .any(|t| t.ends_with("browser_snapshot")) =>
        {
            Reply::call(
                "Let me look once more before I answer.",
                &request.offered("browser_snapshot"),
                json!({}),
            )
        }
        _ => ramble(reply),
    }
}

/// The port of a practice site differs from run to run and must not decide who errs.
fn without_origin(prompt: &str) -> String {
    let mut parts = prompt.split("http://");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push_str(part.find('/').map_or("", |slash| &part[slash..]));
    }
    out
}

fn wrong_click(draw: &mut Draw, request: &Request, reply: Reply) -> Reply {
    let View::Page(page) = view(request) else {
        return ramble(reply);
    };
    let candidates: Vec<(&str, &str)> = page
        .nodes
        .iter()
        .filter(|node| matches!(node.role.as_str(), "link" | "button"))
        .map(|node| (node.target.as_str(), node.name.as_str()))
        .collect();
    if candidates.is_empty() {
        return ramble(reply);
    }
    let (target, name) = draw.pick(&candidates);
    Reply::call(
        format!("I think {name} is the right one."),
        &request.offered("browser_click"),
        json!({"element": name, "target": target}),
    )
}

fn bad_json(mut reply: Reply) -> Reply {
    if let Some(call) = reply.calls.first_mut() {
        call.arguments.pop();
        call.arguments.push_str(", \"and\": ");
    }
    reply
}

fn unknown_tool(mut reply: Reply) -> Reply {
    if let Some(call) = reply.calls.first_mut() {
        call.tool = "browser_teleport".to_owned();
    }
    reply
}

/// Acts and looks in one turn, which is quicker and not wrong: two parallel calls, answered in order.
fn look_at_once(request: &Request, mut reply: Reply) -> Reply {
    let snapshot = request.offered("browser_snapshot");
    if reply.calls.iter().all(|call| call.tool != snapshot) {
        reply.calls.push(Call {
            tool: snapshot,
            arguments: "{}".to_owned(),
        });
    }
    reply
}

fn ramble(mut reply: Reply) -> Reply {
    let doubt = " Wait, let me think about this again from the beginning, to be quite sure that nothing is missed.";
    reply.thought.push_str(&doubt.repeat(40));
    reply
}

/// Another answer of the same look.
fn wrong_answer(right: &str) -> String {
    match right.rfind(|c: char| c.is_ascii_digit()) {
        Some(place) => {
            let digit = right.as_bytes()[place] - b'0';
            format!(
                "{}{}{}",
                &right[..place],
                (digit + 1) % 10,
                &right[place + 1..]
            )
        }
        None => "grey lamp".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompt: &str, seed: u64) -> Request {
        Request::parse(&json!({"messages": [{"role": "user", "content": prompt}], "seed": seed}))
    }

    fn errs(mistakes: f64, prompt: &str, seed: u64) -> bool {
        let config = Config {
            mistakes,
            ..Config::default()
        };
        let reply = Reply::call("Go.", "browser_navigate", json!({"url": "http://x/"}));
        spoil(&config, &request(prompt, seed), reply.clone()) != reply
    }

    #[test]
    fn the_share_of_mistakes_is_kept() {
        let count = |mistakes| (0..1000).filter(|s| errs(mistakes, "go", *s)).count();
        assert_eq!(count(0.0), 0);
        assert_eq!(count(1.0), 1000);
        assert!((100..200).contains(&count(0.15)), "{}", count(0.15));
    }

    #[test]
    fn a_rerun_errs_alike_on_any_port_and_another_seed_differs() {
        let pattern = |port: u32, from: u64| -> Vec<bool> {
            let prompt = format!("Open http://localhost:{port}/shop please");
            (from..from + 64)
                .map(|seed| errs(0.5, &prompt, seed))
                .collect()
        };
        assert_eq!(pattern(4310, 0), pattern(9999, 0));
        assert_ne!(pattern(4310, 0), pattern(4310, 64));
    }

    #[test]
    fn a_name_may_hold_a_skill() {
        assert_eq!(named_share("scripted:0.6"), Some(0.6));
        for plain in ["scripted", "scripted:", "a:b", "a:2", "a:NaN"] {
            assert_eq!(named_share(plain), None, "{plain}");
        }
    }

    #[test]
    fn a_wrong_answer_differs_from_the_right_one() {
        assert_eq!(wrong_answer("12.50"), "12.51");
        assert_eq!(wrong_answer("{\"points\": \"9\"}"), "{\"points\": \"0\"}");
        assert_ne!(wrong_answer("amber cap"), "amber cap");
    }

    #[test]
    fn bad_json_is_bad() {
        let reply = bad_json(Reply::call("", "add", json!({"a": 1})));
        let arguments = &reply.calls[0].arguments;
        assert!(serde_json::from_str::<serde_json::Value>(arguments).is_err());
    }
}
