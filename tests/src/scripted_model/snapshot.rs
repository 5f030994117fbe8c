//! Reads the accessibility snapshot of Playwright MCP out of a tool result.
//!
//! The text is YAML of one particular shape, a node a line, so lines are enough; a snapshot that was cut short is read
//! as far as it goes. Called by the history and by the policies.

/// A page as its snapshot shows it.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    pub url: String,
    pub nodes: Vec<Node>,
    pub tabs: Vec<Tab>,
}

/// One element or piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub depth: usize,
    pub role: String,
    pub name: String,
    /// The ref that actions take as their target.
    pub target: String,
    /// What stands behind the colon.
    pub value: String,
    pub checked: bool,
    pub selected: bool,
    /// Where a link leads.
    pub href: String,
}

/// One open tab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tab {
    pub index: usize,
    pub current: bool,
    pub url: String,
}

impl Snapshot {
    /// Reads `text`; `None` when it holds no snapshot.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut page = Self::default();
        for line in text.lines() {
            if let Some(url) = line.strip_prefix("- Page URL: ") {
                page.url = url.trim().to_owned();
            } else if let Some(tab) = tab(line) {
                page.tabs.push(tab);
            } else if let Some(node) = node(line) {
                page.add(node);
            }
        }
        page.nodes
            .iter()
            .any(|node| !node.target.is_empty())
            .then_some(page)
    }

    fn add(&mut self, node: Node) {
        match (node.role.as_str(), self.nodes.last_mut()) {
            ("/url", Some(link)) => link.href = node.value,
            ("/url", None) => {}
            _ => self.nodes.push(node),
        }
    }

    /// The path of the page's address.
    pub(super) fn path(&self) -> &str {
        path_of(&self.url)
    }

    pub(super) fn find(&self, role: &str, name: &str) -> Option<&Node> {
        self.nodes
            .iter()
            .find(|node| node.role == role && node.name == name)
    }

    pub(super) fn first(&self, role: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.role == role)
    }

    /// Links that lead below `path`, in their order.
    pub(super) fn links_below<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a Node> {
        self.nodes
            .iter()
            .filter(move |node| node.role == "link" && node.href.starts_with(path))
    }

    /// The definition that belongs to the term `name`.
    pub(super) fn fact(&self, name: &str) -> Option<&str> {
        let place = self
            .nodes
            .iter()
            .position(|node| node.role == "term" && node.value == name)?;
        self.nodes
            .get(place + 1)
            .filter(|node| node.role == "definition")
            .map(|node| node.value.as_str())
    }

    /// The option that is chosen in the combobox `name`.
    pub(super) fn chosen(&self, name: &str) -> Option<&str> {
        let place = self
            .nodes
            .iter()
            .position(|node| node.role == "combobox" && node.name == name)?;
        self.nodes[place + 1..]
            .iter()
            .take_while(|node| node.role == "option")
            .find(|node| node.selected)
            .map(|node| node.name.as_str())
    }

    /// The text that stands behind the link `name` in its list item.
    pub(super) fn remark(&self, name: &str) -> Option<&str> {
        let place = self
            .nodes
            .iter()
            .position(|node| node.role == "link" && node.name == name)?;
        self.nodes
            .get(place + 1)
            .filter(|node| node.role == "text")
            .map(|node| node.value.as_str())
    }

    /// The cells of each row that has cells, headers left out.
    pub(super) fn rows(&self) -> Vec<Vec<&str>> {
        let mut rows: Vec<Vec<&str>> = Vec::new();
        for node in &self.nodes {
            match node.role.as_str() {
                "row" => rows.push(Vec::new()),
                "cell" => {
                    if let Some(row) = rows.last_mut() {
                        row.push(&node.name);
                    }
                }
                _ => {}
            }
        }
        rows.retain(|row| !row.is_empty());
        rows
    }
}

/// The path of an address, without host and query.
pub(super) fn path_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = rest.find('/').map_or("/", |slash| &rest[slash..]);
    path.split(['?', '#']).next().unwrap_or(path)
}

/// Reads `- 1: (current) [Title](url)`.
fn tab(line: &str) -> Option<Tab> {
    let (index, rest) = line.strip_prefix("- ")?.split_once(": ")?;
    let index = index.parse().ok()?;
    let (_, url) = rest.rsplit_once("](")?;
    Some(Tab {
        index,
        current: rest.starts_with("(current)"),
        url: url.trim_end_matches(')').to_owned(),
    })
}

/// Reads `  - role "name" [attribute] [ref=e1]: value`.
fn node(line: &str) -> Option<Node> {
    let content = line.trim_start();
    let depth = (line.len() - content.len()) / 2;
    let content = unquote_key(content.strip_prefix("- ")?);
    let role_end = content.find([' ', ':']).unwrap_or(content.len());
    let (role, mut rest) = content.split_at(role_end);
    let known = |c: char| c.is_ascii_lowercase() || c == '/';
    if role.is_empty() || !role.chars().all(known) {
        return None;
    }
    let mut node = Node {
        depth,
        role: role.to_owned(),
        ..Node::default()
    };
    if let Some(quoted) = rest.strip_prefix(" \"") {
        let end = closing_quote(quoted)?;
        node.name = unescape(&quoted[..end]);
        rest = &quoted[end + 1..];
    }
    while let Some(attribute) = rest.strip_prefix(" [") {
        let (attribute, after) = attribute.split_once(']')?;
        match attribute.split_once('=').unwrap_or((attribute, "")) {
            ("ref", target) => node.target = target.to_owned(),
            ("checked", _) => node.checked = true,
            ("selected", _) => node.selected = true,
            _ => {}
        }
        rest = after;
    }
    node.value = value(rest.strip_prefix(':').unwrap_or("").trim());
    Some(node)
}

/// YAML puts a whole key in single quotes when its text would be ambiguous.
fn unquote_key(content: &str) -> String {
    let Some(inner) = content.strip_prefix('\'') else {
        return content.to_owned();
    };
    match inner.rfind('\'') {
        Some(end) => format!("{}{}", inner[..end].replace("''", "'"), &inner[end + 1..]),
        None => inner.to_owned(),
    }
}

fn value(text: &str) -> String {
    match text.strip_prefix('"').and_then(|t| t.strip_suffix('"')) {
        Some(inner) => unescape(inner),
        None => text.to_owned(),
    }
}

fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.char_indices().find_map(|(place, c)| {
        let closes = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        closes.then_some(place)
    })
}

fn unescape(text: &str) -> String {
    text.replace("\\\"", "\"").replace("\\\\", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = r#"### Open tabs
- 0: (current) [Shop](http://localhost:4310/shop?q=red)
- 1: [silver mat](http://localhost:4310/shop/product/silver-mat)
### Page
- Page URL: http://localhost:4310/shop?q=red
- Page Title: Shop
### Snapshot
```yaml
- generic [active] [ref=e1]:
  - main [ref=e4]:
    - heading "Shop" [level=1] [ref=e5]
    - textbox "Max price" [ref=e12]: "50"
    - combobox "Sort" [ref=e14]:
      - option "Name"
      - option "Price up" [selected]
    - checkbox "I agree" [checked] [active] [ref=f7e17]
    - list [ref=e17]:
      - listitem [ref=e18]:
        - link "silver torch" [ref=e19] [cursor=pointer]:
          - /url: /shop/product/silver-torch
        - text: "3.42"
    - 'link "say: \"hi\"" [ref=e20]':
      - /url: "/x?a=1"
    - term [ref=e21]: Stock
    - definition [ref=e22]: "7"
    - row [ref=e23]:
      - cell "Ann" [ref=e24]
      - cell "31" [ref=e25]
```"#;

    #[test]
    fn a_real_snapshot_is_read() {
        let page = Snapshot::parse(SHOP).unwrap();
        assert_eq!(page.path(), "/shop");
        assert_eq!(page.find("textbox", "Max price").unwrap().value, "50");
        assert_eq!(page.find("textbox", "Max price").unwrap().target, "e12");
        assert_eq!(page.chosen("Sort"), Some("Price up"));
        assert!(page.find("checkbox", "I agree").unwrap().checked);
        assert_eq!(page.remark("silver torch"), Some("3.42"));
        assert_eq!(
            page.find("link", "say: \"hi\"").unwrap().href,
            "/x?a=1".to_owned()
        );
        assert_eq!(page.fact("Stock"), Some("7"));
        assert_eq!(page.rows(), [["Ann", "31"]]);
        assert_eq!(page.tabs.len(), 2);
        assert!(page.tabs[0].current && !page.tabs[1].current);
        assert!(page.tabs[1].url.ends_with("/silver-mat"));
    }

    #[test]
    fn a_snapshot_cut_in_the_middle_is_read_as_far_as_it_goes() {
        for end in 0..SHOP.len() {
            let _ = Snapshot::parse(&SHOP[..end]);
        }
        let half = Snapshot::parse(&SHOP[..SHOP.len() / 2]).unwrap();
        assert_eq!(half.nodes[0].target, "e1");
    }

    #[test]
    fn a_link_to_a_snapshot_file_or_an_error_is_no_snapshot() {
        assert!(Snapshot::parse("### Snapshot\n- [Snapshot](out/page.yml)").is_none());
        assert!(Snapshot::parse("### Error\nError: Ref e9 not found").is_none());
    }
}
