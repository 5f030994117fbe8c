//! The shop: a list that can be searched, filtered, sorted and paged, and a page for each product.

use serde::Deserialize;

use crate::page::{Block, Fact, Field, Form, Input, Link, Method, Page};
use crate::world::{Product, World, categories};

/// Products on one page of the list.
const PAGE_SIZE: usize = 6;
/// Longest search text that is used, in characters.
const SEARCH_CHARS_MAX: usize = 60;

/// What a visitor asked the shop for; every field may be empty.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Query {
    /// Words that the name must contain.
    pub q: String,
    /// The category to show; empty shows all.
    pub category: String,
    /// The highest price to show, as typed.
    pub max: String,
    /// `name`, `up` or `down`.
    pub sort: String,
    /// The page, from 1.
    pub page: String,
}

/// The shop's list.
pub fn list(world: &World, query: &Query) -> Page {
    let max_cents = parse_money(&query.max);
    let page = Page::new("Shop").with(Block::Form(form(query)));
    if !query.max.trim().is_empty() && max_cents.is_none() {
        let text = format!(
            "Max price must be a number such as 20.50, got {}",
            query.max
        );
        return page.with(Block::Alert(text));
    }
    let found = select(world, query, max_cents);
    let pages = found.len().div_ceil(PAGE_SIZE).max(1);
    let number = query.page.parse().unwrap_or(1).clamp(1, pages);
    let shown = found.iter().skip((number - 1) * PAGE_SIZE).take(PAGE_SIZE);
    let page = page
        .with(Block::Status(format!(
            "{} found, page {number} of {pages}",
            found.len()
        )))
        .with(Block::Links(shown.map(|p| product_link(p)).collect()));
    match page_links(query, number, pages) {
        links if links.is_empty() => page,
        links => page.with(Block::Links(links)),
    }
}

/// The page of one product.
pub fn product(product: &Product) -> Page {
    let fact = |name, value, id| Fact { name, value, id };
    Page::new(product.name.clone())
        .with(Block::Facts(vec![
            fact("Price", product.price(), "price"),
            fact("Stock", product.stock.to_string(), "stock"),
            fact("Maker", product.maker.to_owned(), "maker"),
        ]))
        .with(Block::Links(vec![Link::new("Back to shop", "/shop")]))
}

fn select<'a>(world: &'a World, query: &Query, max_cents: Option<u64>) -> Vec<&'a Product> {
    let wanted: String = query.q.chars().take(SEARCH_CHARS_MAX).collect();
    let wanted = wanted.trim().to_lowercase();
    let mut found: Vec<&Product> = world
        .products
        .iter()
        .filter(|p| p.name.contains(&wanted))
        .filter(|p| query.category.is_empty() || p.category == query.category)
        .filter(|p| max_cents.is_none_or(|max| p.price_cents <= max))
        .collect();
    match query.sort.as_str() {
        "up" => found.sort_by_key(|p| p.price_cents),
        "down" => found.sort_by_key(|p| std::cmp::Reverse(p.price_cents)),
        _ => {}
    }
    found
}

fn form(query: &Query) -> Form {
    let any = (String::new(), "Any".to_owned());
    let groups = categories().map(|name| (name.to_owned(), name.to_owned()));
    let orders = [("name", "Name"), ("up", "Price up"), ("down", "Price down")];
    Form {
        action: "/shop",
        method: Method::Get,
        hidden: vec![],
        fields: vec![
            Field {
                label: "Search",
                name: "q",
                input: Input::Text(query.q.clone()),
            },
            Field {
                label: "Category",
                name: "category",
                input: Input::Select {
                    options: std::iter::once(any).chain(groups).collect(),
                    chosen: query.category.clone(),
                },
            },
            Field {
                label: "Max price",
                name: "max",
                input: Input::Text(query.max.clone()),
            },
            Field {
                label: "Sort",
                name: "sort",
                input: Input::Select {
                    options: orders.map(|(v, t)| (v.to_owned(), t.to_owned())).into(),
                    chosen: query.sort.clone(),
                },
            },
        ],
        button: "Find",
    }
}

fn product_link(product: &Product) -> Link {
    Link {
        note: product.price(),
        ..Link::new(
            product.name.clone(),
            format!("/shop/product/{}", product.slug()),
        )
    }
}

fn page_links(query: &Query, number: usize, pages: usize) -> Vec<Link> {
    let to = |text: &str, page: usize| {
        let Query {
            q,
            category,
            max,
            sort,
            ..
        } = query;
        let href = format!(
            "/shop?q={}&category={}&max={}&sort={}&page={page}",
            encode(q),
            encode(category),
            encode(max),
            encode(sort)
        );
        Link::new(text, href)
    };
    let previous = (number > 1).then(|| to("Previous page", number - 1));
    let next = (number < pages).then(|| to("Next page", number + 1));
    previous.into_iter().chain(next).collect()
}

/// Reads an amount with at most two decimals as cents; `None` when it is empty or no such amount.
fn parse_money(text: &str) -> Option<u64> {
    let (whole, cents) = text.trim().split_once('.').unwrap_or((text.trim(), ""));
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || whole.len() > 9 || cents.len() > 2 || !digits(whole) || !digits(cents) {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let cents: u64 = format!("{cents:0<2}").parse().ok()?;
    Some(whole * 100 + cents)
}

/// Percent-encodes a value of a query.
fn encode(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' => {
                out.push(char::from(byte));
            }
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(page: &Page) -> Vec<&Link> {
        page.blocks
            .iter()
            .filter_map(|block| match block {
                Block::Links(links) => Some(links),
                _ => None,
            })
            .flatten()
            .collect()
    }

    #[test]
    fn money_is_read_strictly() {
        assert_eq!(parse_money("20"), Some(2000));
        assert_eq!(parse_money(" 20.5 "), Some(2050));
        assert_eq!(parse_money("20.50"), Some(2050));
        for bad in ["", ".5", "20.505", "-3", "many", "1e3", "99999999999"] {
            assert_eq!(parse_money(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_search_finds_exactly_one_product_by_its_name() {
        let world = World::new(7);
        let query = Query {
            q: "AMBER ".to_owned() + world.products[0].name.split_once(' ').unwrap().1,
            ..Query::default()
        };
        let page = list(&world, &query);
        assert_eq!(links(&page).len(), 1);
        assert_eq!(links(&page)[0].text, world.products[0].name);
    }

    #[test]
    fn pages_cover_the_list_without_gaps() {
        let world = World::new(7);
        let mut seen = Vec::new();
        for number in 1..=4 {
            let query = Query {
                category: "Lamps".into(),
                sort: "up".into(),
                page: number.to_string(),
                ..Query::default()
            };
            let page = list(&world, &query);
            seen.extend(
                links(&page)
                    .iter()
                    .filter(|l| !l.note.is_empty())
                    .map(|l| l.note.clone()),
            );
            let pagers = links(&page).iter().filter(|l| l.note.is_empty()).count();
            assert_eq!(pagers, if number == 1 || number == 4 { 1 } else { 2 });
        }
        assert_eq!(seen.len(), 24);
        assert!(seen.iter().map(|p| parse_money(p)).is_sorted());
    }

    #[test]
    fn a_bad_price_is_an_error_in_the_page() {
        let query = Query {
            max: "cheap".into(),
            ..Query::default()
        };
        let page = list(&World::new(7), &query);
        assert!(matches!(&page.blocks[1], Block::Alert(text) if text.ends_with("got cheap")));
    }
}
