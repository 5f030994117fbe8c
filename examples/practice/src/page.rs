//! The page model: what a page says, without how it is written down.
//!
//! Pages are built from the world as these structures and then rendered; nothing here knows HTML. Every interactive
//! element is a link, a field or a button with a name of its own, so that it takes one line of an accessibility
//! snapshot.

/// One page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Title of the document, and its only first-level heading.
    pub title: String,
    /// What stands below the heading, in order.
    pub blocks: Vec<Block>,
}

impl Page {
    /// A page with that title and nothing on it yet.
    pub fn new(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            blocks: Vec::new(),
        }
    }

    /// Adds a block.
    pub fn with(mut self, block: Block) -> Self {
        self.blocks.push(block);
        self
    }
}

/// A part of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Block {
    /// A paragraph.
    Text(String),
    /// What a search or an action came to.
    Status(String),
    /// What is wrong with the visitor's input.
    Alert(String),
    /// Links, one an item, each with an optional remark behind it.
    Links(Vec<Link>),
    /// Names and values.
    Facts(Vec<Fact>),
    /// A table whose headers may be links.
    Table(Table),
    /// A form.
    Form(Form),
    /// Text that is replaced by other text some time after the page was loaded.
    Late(Late),
}

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its text, which is its accessible name.
    pub text: String,
    /// Where it leads; always within the site.
    pub href: String,
    /// What stands behind it; may be empty.
    pub note: String,
    /// Whether it opens in a new tab.
    pub new_tab: bool,
}

impl Link {
    /// A link in the same tab without a remark.
    pub fn new(text: impl Into<String>, href: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            href: href.into(),
            note: String::new(),
            new_tab: false,
        }
    }
}

/// A name and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What the value is.
    pub name: &'static str,
    /// The value.
    pub value: String,
    /// Id of the element that holds the value, for scripts that check a page.
    pub id: &'static str,
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// What the table shows.
    pub caption: String,
    /// Headers; those with a link sort the table.
    pub columns: Vec<(String, Option<String>)>,
    /// Cells, row by row.
    pub rows: Vec<Vec<String>>,
}

/// How a form is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// In the address.
    Get,
    /// In the body.
    Post,
}

/// A form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Form {
    /// Where it is sent.
    pub action: &'static str,
    /// How it is sent.
    pub method: Method,
    /// Values that travel along unseen.
    pub hidden: Vec<(&'static str, String)>,
    /// What the visitor fills in.
    pub fields: Vec<Field>,
    /// Text of the button that sends it.
    pub button: &'static str,
}

/// A field of a form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its label, which is its accessible name.
    pub label: &'static str,
    /// Its name in the form.
    pub name: &'static str,
    /// What can be entered.
    pub input: Input,
}

/// What can be entered in a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// One line of text with its present value.
    Text(String),
    /// A password; its value is never sent back.
    Password,
    /// A choice of (value, text) with the chosen value.
    Select {
        /// Values and their texts.
        options: Vec<(String, String)>,
        /// The value that is chosen.
        chosen: String,
    },
    /// A box that starts empty.
    Checkbox,
}

/// Text that changes after the page was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Late {
    /// What the page says at first.
    pub before: String,
    /// What it says afterwards: a name and a value.
    pub after: Fact,
    /// Time from load to change.
    pub delay_ms: u64,
}
