//! Which tools a rollout is offered. Pure.

use espalier_core::error::FieldError;
use espalier_core::spec::ToolPolicy;
use espalier_core::spec::pattern::Glob;

/// Tools that run code or touch files of the worker: denied unless `allow` or `ask` holds exactly their name, because a
/// glob such as `browser_*` is written by people who do not think of them.
///
/// Of the 25 tools of Playwright MCP 0.0.83 these four are listed:
/// - `browser_run_code_unsafe` runs JavaScript in the server's process, outside the browser;
/// - `browser_evaluate` runs the model's JavaScript in the page, where it can skip the interface that the task is
///   about and send requests in the user's name;
/// - `browser_file_upload` and `browser_drop` read files of the worker.
///
/// `browser_close` is not offered at all by the browser preset (`browser`). The other twenty act on the page as a user
/// does, or read it: navigate, navigate_back, click, drag, hover, type, press_key, fill_form, select_option,
/// handle_dialog, tabs, wait_for, resize, emulate_media, snapshot, find, take_screenshot, console_messages,
/// network_request and network_requests. Where they take a file name they write into the rollout's own folder.
pub const DANGEROUS_TOOLS: &[&str] = &[
    "browser_run_code_unsafe",
    "browser_run_code",
    "browser_evaluate",
    "browser_file_upload",
    "browser_drop",
    // Tools that other capabilities or versions of Playwright MCP add.
    "browser_install",
    "browser_webmcp_call",
    "browser_storage_state",
    "browser_set_storage_state",
];

/// What the policy says about a tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Offered and run.
    Allow,
    /// Offered; each call waits for an answer.
    Ask,
    /// Not offered.
    Deny,
}

/// A policy whose globs are compiled, once for all servers of a rollout.
#[derive(Debug)]
pub(super) struct CompiledPolicy {
    allow: Vec<Rule>,
    ask: Vec<Rule>,
    deny: Vec<Rule>,
}

/// What one server's configuration denies to every job, compiled.
#[derive(Debug)]
pub(super) struct DeniedByServer(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    text: String,
    glob: Glob,
}

impl DeniedByServer {
    /// Compiles the `deny_default` of a server's configuration.
    pub(super) fn new(globs: &[String]) -> Result<Self, FieldError> {
        compile("deny_default", globs).map(Self)
    }

    /// Whether it denies the tool of that name, which is the server's own.
    pub(super) fn denies(&self, raw: &str) -> bool {
        matches(&self.0, raw)
    }
}

impl CompiledPolicy {
    /// Compiles `policy`.
    pub(super) fn new(policy: &ToolPolicy) -> Result<Self, FieldError> {
        Ok(Self {
            allow: compile("tools.allow", &policy.allow)?,
            ask: compile("tools.ask", &policy.ask)?,
            deny: compile("tools.deny", &policy.deny)?,
        })
    }

    /// The verdict about a tool. A rule fits by the name that is offered or by the server's own: a tool whose name was
    /// changed, because another server has it too, must not slip through `deny` and `ask`. Danger is known by `raw`.
    pub(super) fn verdict(&self, denied: &DeniedByServer, offered: &str, raw: &str) -> Verdict {
        let fits = |rules: &[Rule]| matches(rules, offered) || matches(rules, raw);
        if fits(&self.deny) || fits(&denied.0) {
            return Verdict::Deny;
        }
        let is_dangerous = DANGEROUS_TOOLS.contains(&raw);
        let asked = fits(&self.ask);
        if is_dangerous {
            return match (names(&self.ask, offered), names(&self.allow, offered)) {
                (true, _) => Verdict::Ask,
                (false, true) if asked => Verdict::Ask,
                (false, true) => Verdict::Allow,
                (false, false) => Verdict::Deny,
            };
        }
        if asked {
            return Verdict::Ask;
        }
        if self.allow.is_empty() || fits(&self.allow) {
            return Verdict::Allow;
        }
        Verdict::Deny
    }
}

fn compile(field: &str, globs: &[String]) -> Result<Vec<Rule>, FieldError> {
    let rule = |(i, text): (usize, &String)| {
        let refused = |rule| FieldError::new(format!("{field}[{i}]"), text, rule);
        Ok(Rule {
            text: text.clone(),
            glob: Glob::new(text).map_err(refused)?,
        })
    };
    globs.iter().enumerate().map(rule).collect()
}

fn matches(rules: &[Rule], name: &str) -> bool {
    rules.iter().any(|rule| rule.glob.is_match(name))
}

fn names(rules: &[Rule], name: &str) -> bool {
    rules.iter().any(|rule| rule.text == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(allow: &[&str], ask: &[&str], deny: &[&str], names: &[&str]) -> Vec<Verdict> {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let policy = ToolPolicy {
            allow: own(allow),
            ask: own(ask),
            deny: own(deny),
            ..ToolPolicy::default()
        };
        let policy = CompiledPolicy::new(&policy).unwrap();
        let denied = DeniedByServer::new(&[]).unwrap();
        names
            .iter()
            .map(|n| policy.verdict(&denied, n, n))
            .collect()
    }

    use Verdict::{Allow, Ask, Deny};

    #[test]
    fn deny_wins_over_ask_and_ask_over_allow() {
        let got = verdicts(&["a*"], &["ab*"], &["abc"], &["a", "ab", "abc", "other"]);
        assert_eq!(got, [Allow, Ask, Deny, Deny]);
    }

    #[test]
    fn an_empty_allow_stands_for_everything_harmless() {
        let got = verdicts(&[], &["click"], &[], &["click", "echo", "browser_drop"]);
        assert_eq!(got, [Ask, Allow, Deny]);
    }

    #[test]
    fn a_dangerous_tool_is_offered_only_by_its_own_name() {
        let tool = ["browser_run_code_unsafe"];
        assert_eq!(verdicts(&["*"], &[], &[], &tool), [Deny]);
        assert_eq!(
            verdicts(&["browser_run*"], &["browser_*"], &[], &tool),
            [Deny]
        );
        assert_eq!(verdicts(&tool, &[], &[], &tool), [Allow]);
        assert_eq!(verdicts(&[], &tool, &[], &tool), [Ask]);
        assert_eq!(verdicts(&tool, &["browser_*"], &[], &tool), [Ask]);
        assert_eq!(verdicts(&tool, &[], &["*unsafe"], &tool), [Deny]);
    }

    #[test]
    fn danger_is_known_by_the_servers_own_name() {
        let policy = CompiledPolicy::new(&ToolPolicy::default()).unwrap();
        let denied = DeniedByServer::new(&["note_*".into()]).unwrap();
        assert_eq!(
            policy.verdict(&denied, "b__browser_drop", "browser_drop"),
            Deny
        );
        assert_eq!(policy.verdict(&denied, "note_write", "note_write"), Deny);
    }

    #[test]
    fn a_tool_that_was_renamed_is_still_denied_and_asked_about() {
        let policy = ToolPolicy {
            ask: vec!["send".into()],
            deny: vec!["drop_*".into()],
            ..ToolPolicy::default()
        };
        let policy = CompiledPolicy::new(&policy).unwrap();
        let denied = DeniedByServer::new(&["erase".into()]).unwrap();
        assert_eq!(policy.verdict(&denied, "b__drop_all", "drop_all"), Deny);
        assert_eq!(policy.verdict(&denied, "b__erase", "erase"), Deny);
        assert_eq!(policy.verdict(&denied, "b__send", "send"), Ask);
        assert_eq!(policy.verdict(&denied, "b__list", "list"), Allow);
        assert!(denied.denies("erase") && !denied.denies("drop_all"));
    }

    #[test]
    fn a_broken_glob_names_its_field() {
        let policy = ToolPolicy {
            ask: vec!["ok".into(), "a[".into()],
            ..ToolPolicy::default()
        };
        assert_eq!(
            CompiledPolicy::new(&policy).unwrap_err().field,
            "tools.ask[1]"
        );
        let globs = ["ok".to_owned(), "{".repeat(300) + &"}".repeat(300)];
        assert_eq!(
            DeniedByServer::new(&globs).unwrap_err().field,
            "deny_default[1]"
        );
    }
}
