//! Everything that the site knows, derived from one seed: products, teams, accounts, notices, reports, rooms.
//!
//! Pure data and rules; it renders nothing. The pages show it and the task generator asks it for the right answers.

use crate::depot::Depot;
use crate::draw::{Draw, hash};
use crate::words::{
    ANIMALS, CATEGORIES, COLOURS, DAYS, FIRST_NAMES, LAST_NAMES, PLACES, PLANS, TIMES, TREES,
};

/// People in one team: a whole table fits in a small snapshot.
const TEAM_SIZE: usize = 8;
/// Notices on one board.
const BOARD_SIZE: usize = 8;
/// Accounts that can log in.
const ACCOUNTS: usize = 64;
/// Largest party that one booking takes.
pub const GUESTS_MAX: u32 = 8;
/// Longest name that a booking takes, in characters.
pub const NAME_CHARS_MAX: usize = 30;

/// One thing that the shop sells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    /// Two words, unique in the shop.
    pub name: String,
    /// One of the shop's categories.
    pub category: &'static str,
    /// Price in cents; no two products of a category cost the same.
    pub price_cents: u64,
    /// Pieces in stock.
    pub stock: u64,
    /// Who made it.
    pub maker: &'static str,
}

impl Product {
    /// The product's part of its address.
    pub fn slug(&self) -> String {
        slug(&self.name)
    }

    /// The price as the pages show it.
    pub fn price(&self) -> String {
        money(self.price_cents)
    }
}

/// One row of a team's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// First name, unique in the team.
    pub name: &'static str,
    /// Where the person lives.
    pub town: &'static str,
    /// Years; unique in the team.
    pub age: u64,
    /// Pay a day; unique in the team.
    pub pay: u64,
    /// Trips made; unique in the team.
    pub trips: u64,
}

/// A team and its people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Team {
    /// One word, unique.
    pub name: &'static str,
    /// Its members in no particular order.
    pub people: Vec<Person>,
}

/// Someone who can log in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Login name: one or two lower-case words.
    pub user: String,
    /// Two words joined by a dash.
    pub password: String,
    /// Money on the account, in cents.
    pub balance_cents: u64,
    /// Points collected.
    pub points: u64,
    /// The plan that was bought.
    pub plan: &'static str,
}

/// A notice, which opens in a new tab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Two words, unique on its board.
    pub name: String,
    /// The word that only the notice itself shows.
    pub word: String,
}

/// A board of notices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Board {
    /// One word, unique.
    pub name: &'static str,
    /// What hangs on it.
    pub notices: Vec<Notice>,
}

/// A column of a team's table that can be sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// The person's name.
    Name,
    /// Years.
    Age,
    /// Pay a day.
    Pay,
    /// Trips made.
    Trips,
}

impl Column {
    /// The columns that hold numbers.
    pub const NUMBERS: [Column; 3] = [Column::Age, Column::Pay, Column::Trips];

    /// The header of the column.
    pub fn label(self) -> &'static str {
        match self {
            Column::Name => "Name",
            Column::Age => "Age",
            Column::Pay => "Pay",
            Column::Trips => "Trips",
        }
    }

    /// The column of that header in lower case, if there is one.
    pub fn parse(text: &str) -> Option<Self> {
        [Column::Name, Column::Age, Column::Pay, Column::Trips]
            .into_iter()
            .find(|column| column.label().eq_ignore_ascii_case(text))
    }

    /// The number of `person` in this column; the name column has none.
    pub fn number(self, person: &Person) -> u64 {
        match self {
            Column::Name => 0,
            Column::Age => person.age,
            Column::Pay => person.pay,
            Column::Trips => person.trips,
        }
    }
}

/// What a visitor books.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Booking {
    /// First and family name.
    pub name: String,
    /// Party size.
    pub guests: u32,
    /// One of [`DAYS`].
    pub day: String,
    /// One of [`TIMES`].
    pub time: String,
}

/// All that a site of one seed knows.
#[derive(Clone, Debug)]
pub struct World {
    /// The seed that it was made from.
    pub seed: u64,
    /// The shop's catalogue, by name.
    pub products: Vec<Product>,
    /// Teams, by name.
    pub teams: Vec<Team>,
    /// Accounts in the order of their making.
    pub accounts: Vec<Account>,
    /// Boards of notices, by name.
    pub boards: Vec<Board>,
    /// The depot.
    pub depot: Depot,
}

impl World {
    /// Makes the world of `seed`.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            products: products(seed),
            teams: TREES.iter().map(|name| team(seed, name)).collect(),
            accounts: accounts(seed),
            boards: PLACES.iter().map(|name| board(seed, name)).collect(),
            depot: Depot::new(seed),
        }
    }

    /// The product at `slug`.
    pub fn product(&self, slug: &str) -> Option<&Product> {
        self.products.iter().find(|p| p.slug() == slug)
    }

    /// The team called `name`.
    pub fn team(&self, name: &str) -> Option<&Team> {
        self.teams.iter().find(|team| team.name == name)
    }

    /// The account of `user`.
    pub fn account(&self, user: &str) -> Option<&Account> {
        self.accounts.iter().find(|account| account.user == user)
    }

    /// The board called `name`.
    pub fn board(&self, name: &str) -> Option<&Board> {
        self.boards.iter().find(|board| board.name == name)
    }

    /// The total of the report about `place`; none for a place that does not exist.
    pub fn report_total(&self, place: &str) -> Option<u64> {
        let label = format!("report {place}");
        is_pair(place).then(|| Draw::new(self.seed, &label).between(100, 9_999))
    }

    /// The word that the room called `name` shows once it is ready; none for a room that does not exist.
    pub fn room_word(&self, name: &str) -> Option<String> {
        is_pair(name).then(|| code_word(&mut Draw::new(self.seed, &format!("room {name}"))))
    }

    /// Whether nobody can be booked at that day and time; about one pair in six is full.
    pub fn is_full(&self, day: &str, time: &str) -> bool {
        hash(self.seed, &format!("full {day} {time}")).is_multiple_of(6)
    }

    /// The code of a confirmed booking.
    pub fn booking_code(&self, booking: &Booking) -> String {
        let Booking {
            name,
            guests,
            day,
            time,
        } = booking;
        let label = format!("booking {name}|{guests}|{day}|{time}");
        let mut draw = Draw::new(self.seed, &label);
        format!("{}-{}", code_word(&mut draw), draw.between(10, 99))
    }
}

/// Categories of the shop.
pub fn categories() -> impl Iterator<Item = &'static str> {
    CATEGORIES.iter().map(|(name, _)| *name)
}

/// Days that can be booked.
pub fn days() -> &'static [&'static str] {
    &DAYS
}

/// Times that can be booked.
pub fn times() -> &'static [&'static str] {
    &TIMES
}

/// Names of reports and rooms: a tree and a place, such as `oak-harbor`.
pub fn place_pairs() -> impl Iterator<Item = String> {
    TREES
        .iter()
        .flat_map(|tree| PLACES.iter().map(move |place| format!("{tree}-{place}")))
}

/// Writes cents as the pages show money: `1250` is `12.50`.
pub fn money(cents: u64) -> String {
    format!("{}.{:02}", cents / 100, cents % 100)
}

/// The address form of a name: spaces become dashes.
pub fn slug(name: &str) -> String {
    name.replace(' ', "-")
}

fn is_pair(name: &str) -> bool {
    name.split_once('-')
        .is_some_and(|(tree, place)| TREES.contains(&tree) && PLACES.contains(&place))
}

fn code_word(draw: &mut Draw) -> String {
    format!("{}-{}", draw.pick(&COLOURS), draw.pick(&ANIMALS))
}

fn products(seed: u64) -> Vec<Product> {
    let mut products = Vec::new();
    for (category, things) in &CATEGORIES {
        let mut draw = Draw::new(seed, category);
        let mut prices = distinct(&mut draw, 250, 9_999, 24);
        for (place, colour) in COLOURS.iter().enumerate() {
            let thing = things[(place + draw.between(0, 2) as usize) % things.len()];
            products.push(Product {
                name: format!("{colour} {thing}"),
                category,
                price_cents: prices.pop().unwrap_or(250),
                stock: draw.between(0, 40),
                maker: draw.pick(&TREES),
            });
        }
    }
    products.sort_by(|a, b| a.name.cmp(&b.name));
    products
}

fn team(seed: u64, name: &'static str) -> Team {
    let mut draw = Draw::new(seed, &format!("team {name}"));
    let mut names = FIRST_NAMES;
    draw.shuffle(&mut names);
    let ages = distinct(&mut draw, 19, 65, TEAM_SIZE);
    let pays = distinct(&mut draw, 80, 399, TEAM_SIZE);
    let trips = distinct(&mut draw, 1, 60, TEAM_SIZE);
    let people = (0..TEAM_SIZE)
        .map(|i| Person {
            name: names[i],
            town: draw.pick(&PLACES),
            age: ages[i],
            pay: pays[i],
            trips: trips[i],
        })
        .collect();
    Team { name, people }
}

fn accounts(seed: u64) -> Vec<Account> {
    let mut draw = Draw::new(seed, "accounts");
    let mut accounts: Vec<Account> = Vec::with_capacity(ACCOUNTS);
    while accounts.len() < ACCOUNTS {
        let user = format!("{}-{}", draw.pick(&FIRST_NAMES), draw.pick(&LAST_NAMES)).to_lowercase();
        if accounts.iter().any(|account| account.user == user) {
            continue;
        }
        accounts.push(Account {
            user,
            password: code_word(&mut draw),
            balance_cents: draw.between(500, 99_999),
            points: draw.between(0, 990),
            plan: draw.pick(&PLANS),
        });
    }
    accounts
}

fn board(seed: u64, name: &'static str) -> Board {
    let mut draw = Draw::new(seed, &format!("board {name}"));
    let mut trees = TREES;
    draw.shuffle(&mut trees);
    let notices = trees[..BOARD_SIZE]
        .iter()
        .map(|tree| Notice {
            name: format!("{tree} {}", draw.pick(&PLACES)),
            word: code_word(&mut draw),
        })
        .collect();
    Board { name, notices }
}

/// `count` different numbers of `low..=high`, which must hold at least that many.
fn distinct(draw: &mut Draw, low: u64, high: u64, count: usize) -> Vec<u64> {
    let mut numbers: Vec<u64> = Vec::with_capacity(count);
    while numbers.len() < count {
        let number = draw.between(low, high);
        if !numbers.contains(&number) {
            numbers.push(number);
        }
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_prices_differ_within_a_category() {
        let world = World::new(7);
        let names: HashSet<_> = world.products.iter().map(|p| &p.name).collect();
        assert_eq!(names.len(), 192);
        for category in categories() {
            let prices: HashSet<_> = world
                .products
                .iter()
                .filter(|p| p.category == category)
                .map(|p| p.price_cents)
                .collect();
            assert_eq!(prices.len(), 24, "{category}");
        }
    }

    #[test]
    fn a_seed_decides_everything() {
        let (a, b, other) = (World::new(7), World::new(7), World::new(8));
        assert_eq!(a.products, b.products);
        assert_eq!(a.accounts, b.accounts);
        assert_ne!(a.products, other.products);
        assert_ne!(a.teams, other.teams);
    }

    #[test]
    fn a_booking_code_depends_on_every_field() {
        let world = World::new(7);
        let booking = Booking {
            name: "Ada Hill".into(),
            guests: 2,
            day: "Monday".into(),
            time: "noon".into(),
        };
        let code = world.booking_code(&booking);
        let more = Booking {
            guests: 3,
            ..booking.clone()
        };
        assert_eq!(code, world.booking_code(&booking));
        assert_ne!(code, world.booking_code(&more));
        assert_ne!(code, World::new(8).booking_code(&booking));
    }

    #[test]
    fn some_times_are_full_and_most_are_not() {
        let world = World::new(7);
        let full = days()
            .iter()
            .flat_map(|day| times().iter().map(|time| world.is_full(day, time)))
            .filter(|full| *full)
            .count();
        assert!((1..=18).contains(&full), "{full} of 36 are full");
    }

    #[test]
    fn only_known_places_have_reports_and_rooms() {
        let world = World::new(7);
        assert!(world.report_total("oak-harbor").is_some());
        assert!(world.room_word("oak-harbor").is_some());
        assert_eq!(world.report_total("oak"), None);
        assert_eq!(world.room_word("oak-nowhere"), None);
        assert_eq!(place_pairs().count(), 576);
    }
}
