//! The crew: a table for each team, sorted by a click on a header; a second click turns the order round.

use serde::Deserialize;

use crate::page::{Block, Link, Page, Table};
use crate::world::{Column, Person, Team, World};

/// How a visitor wants a table sorted.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Query {
    /// A column in lower case; empty leaves the table as it is.
    pub sort: String,
    /// `down` for largest first.
    pub dir: String,
}

/// All teams.
pub fn index(world: &World) -> Page {
    let links = world
        .teams
        .iter()
        .map(|team| Link::new(team.name, format!("/crew/{}", team.name)))
        .collect();
    Page::new("Crew").with(Block::Links(links))
}

/// The table of one team.
pub fn team(team: &Team, query: &Query) -> Page {
    let sorted = Column::parse(&query.sort);
    let down = query.dir == "down";
    let mut people: Vec<&Person> = team.people.iter().collect();
    if let Some(column) = sorted {
        people.sort_by_key(|person| (column.number(person), person.name));
    }
    if down {
        people.reverse();
    }
    let header = |column: Column| {
        let key = column.label().to_lowercase();
        let dir = if sorted == Some(column) && !down {
            "down"
        } else {
            "up"
        };
        let href = format!("/crew/{}?sort={key}&dir={dir}", team.name);
        (column.label().to_owned(), Some(href))
    };
    let order = match sorted {
        Some(column) => format!(
            "Sorted by {}, {} first",
            column.label(),
            if down { "largest" } else { "smallest" }
        ),
        None => "Not sorted".to_owned(),
    };
    Page::new(format!("Team {}", team.name)).with(Block::Table(Table {
        caption: order,
        columns: vec![
            header(Column::Name),
            ("Town".to_owned(), None),
            header(Column::Age),
            header(Column::Pay),
            header(Column::Trips),
        ],
        rows: people.iter().map(|person| row(person)).collect(),
    }))
}

fn row(person: &Person) -> Vec<String> {
    vec![
        person.name.to_owned(),
        person.town.to_owned(),
        person.age.to_string(),
        person.pay.to_string(),
        person.trips.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(sort: &str, dir: &str) -> Table {
        let world = World::new(7);
        let query = Query {
            sort: sort.into(),
            dir: dir.into(),
        };
        let page = team(&world.teams[0], &query);
        match page.blocks.into_iter().next() {
            Some(Block::Table(table)) => table,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn numbers_are_sorted_as_numbers_both_ways() {
        let up: Vec<u64> = table("trips", "up")
            .rows
            .iter()
            .map(|row| row[4].parse().unwrap())
            .collect();
        let down: Vec<u64> = table("trips", "down")
            .rows
            .iter()
            .map(|row| row[4].parse().unwrap())
            .collect();
        assert!(up.is_sorted());
        assert!(down.iter().rev().is_sorted());
    }

    #[test]
    fn a_second_click_on_a_header_turns_the_order_round() {
        let first = table("", "").columns[3].1.clone().unwrap();
        assert!(first.ends_with("sort=pay&dir=up"));
        let second = table("pay", "up").columns[3].1.clone().unwrap();
        assert!(second.ends_with("sort=pay&dir=down"));
        assert!(table("name", "up").rows.iter().map(|r| &r[0]).is_sorted());
    }
}
