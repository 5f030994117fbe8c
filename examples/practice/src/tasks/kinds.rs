//! The kinds of tasks: what each asks, how it is done, what the right answer is.
//!
//! A task is a small value; its key, prompt, hints and verifier are functions of it and of the world.

use std::borrow::Cow;
use std::str::FromStr;

use serde_json::{Value, json};

use super::depot;
use crate::depot::Parcel;
use crate::words::{FIRST_NAMES, LAST_NAMES};
use crate::world::{
    Account, Board, Booking, Column, GUESTS_MAX, Notice, Person, Product, Team, World, categories,
    days, money, place_pairs, slug, times,
};

/// Places in a sorted list that are asked for: all on the first page of the shop, all in a team's table.
const RANKS: [(usize, &str); 4] = [(1, "first"), (2, "second"), (3, "third"), (4, "fourth")];
/// Price limits of counting tasks, in whole units.
const LIMITS: std::ops::RangeInclusive<u64> = 15..=90;

/// A kind of task: one procedure on one part of the site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Search a product, read its price.
    ShopPrice,
    /// Filter and sort, read a place of the list.
    ShopRank,
    /// Filter by category and price, read the count.
    ShopCount,
    /// Two turns: the price of a product, then its stock.
    ShopTalk,
    /// Three steps of a form, read the code.
    Booking,
    /// Sort a table, read a place of it.
    TableRank,
    /// Log in, read a field.
    Login,
    /// Follow a link into a new tab, read a word.
    NewTab,
    /// Wait for a page that comes late.
    SlowPage,
    /// Wait for a page that changes.
    LatePage,
    /// Find a parcel in the way that the depot has.
    DepotFind,
    /// Read the one of a parcel's codes that is needed at the depot.
    DepotCode,
    /// Press the button that signs at the depot, read the receipt.
    DepotSign,
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Kind::every()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| {
                let names: Vec<_> = Kind::every().map(Kind::as_str).collect();
                format!("`kind` must be one of {}, got {text}", names.join(", "))
            })
    }
}

impl Kind {
    /// The kinds that a page tells how to do, in the order in which a task list goes through them.
    pub const ALL: [Kind; 10] = [
        Kind::ShopPrice,
        Kind::ShopRank,
        Kind::Booking,
        Kind::TableRank,
        Kind::Login,
        Kind::NewTab,
        Kind::SlowPage,
        Kind::LatePage,
        Kind::ShopCount,
        Kind::ShopTalk,
    ];

    /// The kinds that need to know what no page tells.
    pub const DEPOT: [Kind; 3] = [Kind::DepotFind, Kind::DepotCode, Kind::DepotSign];

    /// The name in a job.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::ShopPrice => "shop_price",
            Kind::ShopRank => "shop_rank",
            Kind::ShopCount => "shop_count",
            Kind::ShopTalk => "shop_talk",
            Kind::Booking => "booking",
            Kind::TableRank => "table_rank",
            Kind::Login => "login",
            Kind::NewTab => "new_tab",
            Kind::SlowPage => "slow_page",
            Kind::LatePage => "late_page",
            Kind::DepotFind => "depot_find",
            Kind::DepotCode => "depot_code",
            Kind::DepotSign => "depot_sign",
        }
    }

    /// All of both.
    pub fn every() -> impl Iterator<Item = Kind> {
        Self::ALL.into_iter().chain(Self::DEPOT)
    }

    /// Every task of this kind in `world`.
    pub fn tasks(self, world: &World) -> Vec<Task> {
        match self {
            Kind::ShopPrice => world
                .products
                .iter()
                .cloned()
                .map(Task::ShopPrice)
                .collect(),
            Kind::ShopTalk => world.products.iter().cloned().map(Task::ShopTalk).collect(),
            Kind::ShopRank => shop_ranks(),
            Kind::ShopCount => categories()
                .flat_map(|category| LIMITS.map(move |max| Task::ShopCount { category, max }))
                .collect(),
            Kind::Booking => bookings(world),
            Kind::TableRank => world.teams.iter().flat_map(table_ranks).collect(),
            Kind::Login => world.accounts.iter().flat_map(logins).collect(),
            Kind::NewTab => world.boards.iter().flat_map(notices).collect(),
            Kind::SlowPage => place_pairs().map(Task::SlowPage).collect(),
            Kind::LatePage => place_pairs().map(Task::LatePage).collect(),
            Kind::DepotFind => depot::finds(world),
            Kind::DepotCode => depot::codes(world),
            Kind::DepotSign => depot::signs(world),
        }
    }
}

/// A field of an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccountField {
    /// Its money.
    Balance,
    /// Its points.
    Points,
    /// Its plan.
    Plan,
}

impl AccountField {
    const ALL: [AccountField; 3] = [Self::Balance, Self::Points, Self::Plan];

    /// Its name in a task.
    pub fn label(self) -> &'static str {
        match self {
            Self::Balance => "balance",
            Self::Points => "points",
            Self::Plan => "plan",
        }
    }

    /// Its name on the page.
    pub fn title(self) -> &'static str {
        match self {
            Self::Balance => "Balance",
            Self::Points => "Points",
            Self::Plan => "Plan",
        }
    }

    /// What it is of that account.
    pub fn value(self, account: &Account) -> String {
        match self {
            Self::Balance => money(account.balance_cents),
            Self::Points => account.points.to_string(),
            Self::Plan => account.plan.to_owned(),
        }
    }
}

/// One task.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the kinds say what each asks")]
pub enum Task {
    ShopPrice(Product),
    ShopRank {
        category: &'static str,
        rank: usize,
        dear: bool,
    },
    ShopCount {
        category: &'static str,
        max: u64,
    },
    ShopTalk(Product),
    Booking(Booking),
    TableRank {
        team: &'static str,
        column: Column,
        rank: usize,
        largest: bool,
    },
    Login {
        account: Account,
        field: AccountField,
    },
    NewTab {
        board: &'static str,
        notice: Notice,
    },
    SlowPage(String),
    LatePage(String),
    DepotFind(Parcel),
    DepotCode(Parcel),
    DepotSign(Parcel),
}

/// What a job says about a task.
pub struct Text {
    /// What is asked: one turn as text, or several in a list. `${site}` stands for the site's address.
    pub prompt: Value,
    /// How it is done.
    pub hints: Cow<'static, str>,
    /// Who judges the answer.
    pub verify: Value,
}

impl Task {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Task::ShopPrice(_) => Kind::ShopPrice,
            Task::ShopRank { .. } => Kind::ShopRank,
            Task::ShopCount { .. } => Kind::ShopCount,
            Task::ShopTalk(_) => Kind::ShopTalk,
            Task::Booking(_) => Kind::Booking,
            Task::TableRank { .. } => Kind::TableRank,
            Task::Login { .. } => Kind::Login,
            Task::NewTab { .. } => Kind::NewTab,
            Task::SlowPage(_) => Kind::SlowPage,
            Task::LatePage(_) => Kind::LatePage,
            Task::DepotFind(_) => Kind::DepotFind,
            Task::DepotCode(_) => Kind::DepotCode,
            Task::DepotSign(_) => Kind::DepotSign,
        }
    }

    /// The words that make the task up; two tasks with one key would be the same task.
    pub fn key(&self) -> String {
        let rest = match self {
            Task::ShopPrice(product) | Task::ShopTalk(product) => product.slug(),
            Task::ShopRank {
                category,
                rank,
                dear,
            } => format!("{category}.{rank}.{}", if *dear { "dear" } else { "cheap" }),
            Task::ShopCount { category, max } => format!("{category}.{max}"),
            Task::Booking(b) => format!("{}.{}.{}.{}", slug(&b.name), b.guests, b.day, b.time),
            Task::TableRank {
                team,
                column,
                rank,
                largest,
            } => {
                let order = if *largest { "largest" } else { "smallest" };
                format!("{team}.{}.{rank}.{order}", column.label())
            }
            Task::Login { account, field } => format!("{}.{}", account.user, field.label()),
            Task::NewTab { board, notice } => format!("{board}.{}", slug(&notice.name)),
            Task::SlowPage(name) | Task::LatePage(name) => name.clone(),
            Task::DepotFind(parcel) | Task::DepotCode(parcel) | Task::DepotSign(parcel) => {
                parcel.slug()
            }
        };
        format!("{}.{}", self.kind().as_str(), rest.to_lowercase())
    }

    /// What a job says about it.
    pub fn text(&self, world: &World) -> Text {
        match self {
            Task::ShopPrice(product) => shop_price(product),
            Task::ShopRank {
                category,
                rank,
                dear,
            } => shop_rank(world, category, *rank, *dear),
            Task::ShopCount { category, max } => shop_count(world, category, *max),
            Task::ShopTalk(product) => shop_talk(product),
            Task::Booking(booking) => booking_text(world, booking),
            Task::TableRank {
                team,
                column,
                rank,
                largest,
            } => table_rank(world, team, *column, *rank, *largest),
            Task::Login { account, field } => login(account, *field),
            Task::NewTab { board, notice } => new_tab(board, notice),
            Task::SlowPage(name) => slow_page(world, name),
            Task::LatePage(name) => late_page(world, name),
            Task::DepotFind(parcel) => depot::find(world, parcel),
            Task::DepotCode(parcel) => depot::code(world, parcel),
            Task::DepotSign(parcel) => depot::sign(world, parcel),
        }
    }
}

fn shop_ranks() -> Vec<Task> {
    let mut tasks = Vec::new();
    for category in categories() {
        for (rank, _) in RANKS {
            for dear in [false, true] {
                tasks.push(Task::ShopRank {
                    category,
                    rank,
                    dear,
                });
            }
        }
    }
    tasks
}

fn bookings(world: &World) -> Vec<Task> {
    let free: Vec<(&str, &str)> = days()
        .iter()
        .flat_map(|day| times().iter().map(move |time| (*day, *time)))
        .filter(|(day, time)| !world.is_full(day, time))
        .collect();
    let names = FIRST_NAMES
        .iter()
        .flat_map(|first| LAST_NAMES.iter().map(move |last| format!("{first} {last}")));
    let mut tasks = Vec::new();
    for name in names {
        for guests in 1..=GUESTS_MAX {
            for (day, time) in &free {
                tasks.push(Task::Booking(Booking {
                    name: name.clone(),
                    guests,
                    day: (*day).to_owned(),
                    time: (*time).to_owned(),
                }));
            }
        }
    }
    tasks
}

fn table_ranks(team: &Team) -> Vec<Task> {
    let mut tasks = Vec::new();
    for column in Column::NUMBERS {
        for (rank, _) in RANKS {
            for largest in [false, true] {
                tasks.push(Task::TableRank {
                    team: team.name,
                    column,
                    rank,
                    largest,
                });
            }
        }
    }
    tasks
}

fn logins(account: &Account) -> impl Iterator<Item = Task> + '_ {
    AccountField::ALL.into_iter().map(|field| Task::Login {
        account: account.clone(),
        field,
    })
}

fn notices(board: &Board) -> impl Iterator<Item = Task> + '_ {
    board.notices.iter().map(|notice| Task::NewTab {
        board: board.name,
        notice: notice.clone(),
    })
}

fn ordinal(rank: usize) -> &'static str {
    RANKS
        .iter()
        .find(|(number, _)| *number == rank)
        .map_or("first", |(_, word)| word)
}

fn shop_price(product: &Product) -> Text {
    Text {
        prompt: json!(format!(
            "What does the \"{}\" cost in the shop at ${{site}}/shop? Answer with the price only, such as 12.50.",
            product.name
        )),
        hints: "Open the shop, type the product's name into Search with submit, and read the price behind its link.".into(),
        verify: json!({"answer": {"number": product.price_cents as f64 / 100.0, "tolerance": 0.001}}),
    }
}

fn shop_rank(world: &World, category: &str, rank: usize, dear: bool) -> Text {
    let mut found: Vec<&Product> = world
        .products
        .iter()
        .filter(|p| p.category == category)
        .collect();
    found.sort_by_key(|p| p.price_cents);
    if dear {
        found.reverse();
    }
    let order = if dear {
        "dearest first"
    } else {
        "cheapest first"
    };
    Text {
        prompt: json!(format!(
            "List the category \"{category}\" of the shop at ${{site}}/shop by price, {order}. Which product is the \
             {} of the list? Answer with its name only.",
            ordinal(rank)
        )),
        hints: "Choose the Category, choose Sort, press Find, and count down the list.".into(),
        verify: json!({"answer": {"equals": found.get(rank - 1).map_or("", |p| &p.name)}}),
    }
}

fn shop_count(world: &World, category: &str, max: u64) -> Text {
    let count = world
        .products
        .iter()
        .filter(|p| p.category == category && p.price_cents <= max * 100)
        .count();
    Text {
        prompt: json!(format!(
            "How many products of the category \"{category}\" cost at most \"{max}\" in the shop at ${{site}}/shop? \
             Answer with the number only."
        )),
        hints: "Choose the Category, type the Max price with submit, and read how many were found."
            .into(),
        verify: json!({"answer": {"number": count as f64, "tolerance": 0.0}}),
    }
}

fn shop_talk(product: &Product) -> Text {
    Text {
        prompt: json!([
            format!(
                "What does the \"{}\" cost in the shop at ${{site}}/shop? Answer with the price only, such as 12.50.",
                product.name
            ),
            format!(
                "And how many pieces of the \"{}\" are in stock? Open its page in the shop at ${{site}}/shop. \
                 Answer with the number only.",
                product.name
            ),
        ]),
        hints: "Search the product by its name and read the price; for the stock, follow its link and read Stock.".into(),
        verify: json!({"all": [
            {"answer": {"number": product.stock as f64, "tolerance": 0.0}},
            {"url": {"contains": format!("/shop/product/{}", product.slug())}},
        ]}),
    }
}

fn booking_text(world: &World, booking: &Booking) -> Text {
    let code = world.booking_code(booking);
    let Booking {
        name,
        guests,
        day,
        time,
    } = booking;
    Text {
        prompt: json!(format!(
            "Book a visit at ${{site}}/booking for \"{name}\" with \"{guests}\" guests on \"{day}\" at \"{time}\". \
             Answer with the code of the booking only, and leave the confirmation open."
        )),
        hints: "Step 1: type Name and Guests, press Next. Step 2: choose Day and Time, press Next. Step 3: tick the \
                box, press Confirm, read the Code.".into(),
        verify: json!({"weighted": [
            {"weight": 0.7, "check": {"page": {
                "script": format!("() => document.querySelector('#code')?.textContent === '{code}'"),
            }}},
            {"weight": 0.3, "check": {"all": [
                {"answer": {"contains": code}},
                {"url": {"contains": "/booking/confirm"}},
            ]}},
        ]}),
    }
}

fn table_rank(world: &World, team: &str, column: Column, rank: usize, largest: bool) -> Text {
    let mut people: Vec<&Person> = world
        .team(team)
        .map_or(vec![], |t| t.people.iter().collect());
    people.sort_by_key(|person| column.number(person));
    if largest {
        people.reverse();
    }
    let order = if largest { "largest" } else { "smallest" };
    Text {
        prompt: json!(format!(
            "Sort the table at ${{site}}/crew/{team} by \"{}\", {order} first. Who is the {} of the table? Answer \
             with the name only.",
            column.label(),
            ordinal(rank)
        )),
        hints: "Press the column's header once for smallest first and twice for largest first, then count down.".into(),
        verify: json!({"answer": {"equals": people.get(rank - 1).map_or("", |p| p.name)}}),
    }
}

fn login(account: &Account, field: AccountField) -> Text {
    let label = field.label();
    Text {
        prompt: json!(format!(
            "Log in at ${{site}}/login as \"{}\" with the password \"{}\" and read the \"{label}\" of the account. \
             Answer with JSON such as {{\"{label}\": \"…\"}} and nothing else.",
            account.user, account.password
        )),
        hints: "Type User, type Password with submit, and read the value on the account's page."
            .into(),
        verify: json!({"answer": {
            "json_path": format!("$.{label}"),
            "equals": field.value(account),
        }}),
    }
}

fn new_tab(board: &str, notice: &Notice) -> Text {
    Text {
        prompt: json!(format!(
            "Which word does the notice \"{}\" on the board at ${{site}}/notices/{board} show? Answer with the word \
             only.",
            notice.name
        )),
        hints: "Press the notice's link, select the new tab, and read Word there.".into(),
        verify: json!({"all": [
            {"answer": {"regex": format!("^{}[.]?$", notice.word)}},
            {"tool_called": {"name": "browser_navigate", "arguments": {
                "url": {"contains": "/notices"},
            }}},
        ]}),
    }
}

fn slow_page(world: &World, name: &str) -> Text {
    let total = world.report_total(name).unwrap_or_default();
    Text {
        prompt: json!(format!(
            "What is the total in the report at ${{site}}/slow/{name}? The page takes a while to come. Answer with \
             the number only."
        )),
        hints: "Open the address, wait for the page, and read Total.".into(),
        verify: json!({"weighted": [
            {"weight": 0.8, "check": {"answer": {"number": total as f64, "tolerance": 0.0}}},
            {"weight": 0.2, "check": {"tool_called": {"name": "browser_navigate", "arguments": {
                "url": {"contains": format!("/slow/{name}")},
            }}}},
        ]}),
    }
}

fn late_page(world: &World, name: &str) -> Text {
    let word = world.room_word(name).unwrap_or_default();
    Text {
        prompt: json!(format!(
            "Which word does the room at ${{site}}/late/{name} show once it is loaded? Answer with the word only."
        )),
        hints: "Open the address, wait until the loading text is gone, take a new snapshot, and read Word.".into(),
        verify: json!({"any": [
            {"answer": {"equals": word}},
            {"answer": {"regex": format!("^The word is {word}[.]?$")}},
        ]}),
    }
}
