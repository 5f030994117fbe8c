//! A browser that is none: the practice site as a model sees it through Playwright, without browser and network.
//!
//! It answers the calls of tools with the very text that the agent worker shows of a real browser's answers, once that is
//! compacted and snapshots are put in place; a test holds the two together. So traces can be made by the hundred
//! thousand.

mod aria;

use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::page::{Form, Input, Page};
use crate::pages;
use crate::route::{Request, Session, Shown, answer};
use crate::world::World;

pub use aria::{Does, Part, value as quoted};
use aria::{State, forms, snapshot};

/// A tab of a browser on the practice site.
#[derive(Clone, Debug)]
pub struct Twin<'w> {
    world: &'w World,
    /// The site's address, such as `http://localhost:4310`.
    origin: String,
    user: Option<String>,
    /// Documents that were loaded.
    documents: u64,
    /// Path and fields of the address.
    address: String,
    page: Page,
    state: State,
    parts: Vec<Part>,
    tree: String,
}

/// A call that this browser does not know, or that means nothing on its page: a mistake of whoever teaches.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` cannot be called so on this page")]
pub struct Unknown(String);

impl<'w> Twin<'w> {
    /// A browser that has not opened anything.
    pub fn new(world: &'w World, origin: impl Into<String>) -> Self {
        Self {
            world,
            origin: origin.into(),
            user: None,
            documents: 0,
            address: String::new(),
            page: pages::missing(),
            state: State::default(),
            parts: Vec::new(),
            tree: String::new(),
        }
    }

    /// What can be operated on the page, in order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The page.
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Answers a call as the tools of Playwright do.
    ///
    /// # Errors
    /// When the tool is not known here, or its arguments do not fit the page.
    pub fn call(&mut self, tool: &str, arguments: &Map<String, Value>) -> Result<String, Unknown> {
        let text = |name: &str| arguments.get(name).and_then(Value::as_str);
        let unknown = || Unknown(tool.to_owned());
        let done = match tool {
            "browser_navigate" => text("url").and_then(|url| self.open(url)),
            "browser_click" => text("target").and_then(|target| self.click(target)),
            "browser_type" => {
                let submit = arguments.get("submit").and_then(Value::as_bool) == Some(true);
                let (target, text) = text("target").zip(text("text")).ok_or_else(unknown)?;
                let code = self.filling(target, text);
                let done = self.enter(target, text, submit);
                if done.is_some() && !submit {
                    // Of a field that was only filled Playwright shows the code that did it, and no page.
                    return code.ok_or_else(unknown);
                }
                done
            }
            _ => None,
        };
        done.ok_or_else(unknown)?;
        Ok(self.shown())
    }

    /// What a tool's answer shows of a field that was filled.
    fn filling(&self, target: &str, text: &str) -> Option<String> {
        let part = self.parts.iter().find(|part| part.id == target)?;
        let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
        Some(format!(
            "### Ran Playwright code\n```js\nawait page.getByRole('textbox', {{ name: {} }}).fill({});\n```",
            quoted(&part.name),
            quoted(text)
        ))
    }

    /// What a tool's answer shows of the page.
    fn shown(&self) -> String {
        let mut out = String::with_capacity(self.tree.len() + 256);
        let _ = write!(
            out,
            "### Page\n- Page URL: {}{}\n- Page Title: {}\n### Snapshot\n```yaml\n{}```",
            self.origin, self.address, self.page.title, self.tree
        );
        out
    }

    fn open(&mut self, url: &str) -> Option<()> {
        let address = url.strip_prefix(&self.origin)?;
        let address = if address.is_empty() { "/" } else { address };
        self.visit(address.to_owned(), None);
        Some(())
    }

    fn click(&mut self, target: &str) -> Option<()> {
        let at = self.parts.iter().position(|part| part.id == target)?;
        match self.parts[at].does.clone() {
            Does::Leads(href) => self.visit(href, None),
            Does::Sends(form) => self.send(form)?,
            Does::Holds(..) => {
                self.state.focus = Some(at);
                self.look();
            }
        }
        Some(())
    }

    fn enter(&mut self, target: &str, text: &str, submit: bool) -> Option<()> {
        let at = self.parts.iter().position(|part| part.id == target)?;
        let Does::Holds(form, field) = self.parts[at].does else {
            return None;
        };
        self.state.values[form][field] = text.to_owned();
        self.state.focus = Some(at);
        match submit {
            true => self.send(form)?,
            false => self.look(),
        }
        Some(())
    }

    fn send(&mut self, number: usize) -> Option<()> {
        let form = forms(&self.page).nth(number)?;
        let fields = fields(form, &self.state.values[number]);
        let action = form.action.to_owned();
        match form.method {
            crate::page::Method::Get => self.visit(format!("{action}?{fields}"), None),
            crate::page::Method::Post => self.visit(action, Some(fields)),
        }
        Some(())
    }

    /// Loads an address, with a body where it is posted to, and follows where that leads.
    fn visit(&mut self, mut address: String, mut body: Option<String>) {
        let page = loop {
            let (path, query) = address.split_once('?').unwrap_or((&address, ""));
            let request = Request {
                post: body.is_some(),
                path,
                fields: body.as_deref().unwrap_or(query),
                user: self.user.as_deref(),
            };
            let answer = answer(self.world, request);
            match answer.session {
                Session::Keep => {}
                Session::Open(user) => self.user = Some(user),
                Session::Close => self.user = None,
            }
            match answer.shown {
                Shown::Page(_, page) => break page,
                Shown::Redirect(to) => (address, body) = (to, None),
            }
        };
        self.address = address;
        self.state = State::of(&page);
        self.page = page;
        self.documents += 1;
        self.look();
    }

    fn look(&mut self) {
        (self.tree, self.parts) = snapshot(&self.page, &self.state, self.documents - 1);
    }
}

/// The fields of a form as it sends them.
fn fields(form: &Form, values: &[String]) -> String {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    pairs.extend(
        form.hidden
            .iter()
            .map(|(name, value)| (*name, value.as_str())),
    );
    for (field, value) in form.fields.iter().zip(values) {
        match &field.input {
            Input::Checkbox if value.is_empty() => {}
            _ => pairs.push((field.name, value)),
        }
    }
    serde_urlencoded::to_string(pairs).unwrap_or_default()
}
