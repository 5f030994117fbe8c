//! The booking form: who, when, confirm. What was entered travels in hidden fields, so the server keeps nothing, and
//! every step checks all that came before it again.

use serde::Deserialize;

use crate::page::{Block, Fact, Field, Form, Input, Method, Page};
use crate::world::{Booking, GUESTS_MAX, NAME_CHARS_MAX, World, days, times};

/// The fields of all steps, as sent.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// First and family name.
    pub name: String,
    /// Party size.
    pub guests: String,
    /// Day of the visit.
    pub day: String,
    /// Time of the visit.
    pub time: String,
    /// `yes` once the box was ticked.
    pub agree: String,
}

/// Step 1, empty or with an error.
pub fn who(entry: &Entry, error: Option<String>) -> Page {
    let form = Form {
        action: "/booking/when",
        method: Method::Post,
        hidden: vec![],
        fields: vec![
            text("Name", "name", &entry.name),
            text("Guests", "guests", &entry.guests),
        ],
        button: "Next",
    };
    step("Booking step 1 of 3", error, form)
}

/// What the answer to step 1 leads to: step 2, or step 1 again with an error.
pub fn when(entry: &Entry) -> Page {
    match check_who(entry) {
        Ok(_) => when_form(entry, None),
        Err(error) => who(entry, Some(error)),
    }
}

/// What the answer to step 2 leads to: step 3, or an earlier step again with an error.
pub fn review(world: &World, entry: &Entry) -> Page {
    if let Err(error) = check_who(entry) {
        return who(entry, Some(error));
    }
    match check_all(world, entry) {
        Ok(booking) => review_form(entry, &booking, None),
        Err(error) => when_form(entry, Some(error)),
    }
}

/// What the answer to step 3 leads to: the confirmation, or an earlier step again with an error.
pub fn confirm(world: &World, entry: &Entry) -> Page {
    if let Err(error) = check_who(entry) {
        return who(entry, Some(error));
    }
    let booking = match check_all(world, entry) {
        Ok(booking) => booking,
        Err(error) => return when_form(entry, Some(error)),
    };
    if entry.agree != "yes" {
        let error = "Tick the box to agree to the rules".to_owned();
        return review_form(entry, &booking, Some(error));
    }
    let mut facts = vec![Fact {
        name: "Code",
        value: world.booking_code(&booking),
        id: "code",
    }];
    facts.extend(facts_of(&booking));
    Page::new("Booking confirmed").with(Block::Facts(facts))
}

fn check_who(entry: &Entry) -> Result<(String, u32), String> {
    let name = entry.name.trim();
    let letters = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphabetic());
    let parts: Vec<&str> = name.split(' ').collect();
    if parts.len() != 2 || !parts.iter().all(|p| letters(p)) || name.len() > NAME_CHARS_MAX {
        return Err(format!(
            "Name must be a first and a family name, letters only, at most {NAME_CHARS_MAX}"
        ));
    }
    match entry.guests.trim().parse() {
        Ok(guests) if (1..=GUESTS_MAX).contains(&guests) => Ok((name.to_owned(), guests)),
        _ => Err(format!("Guests must be a number from 1 to {GUESTS_MAX}")),
    }
}

fn check_all(world: &World, entry: &Entry) -> Result<Booking, String> {
    let (name, guests) = check_who(entry)?;
    let Entry { day, time, .. } = entry;
    if !days().contains(&day.as_str()) {
        return Err("Choose a day".into());
    }
    if !times().contains(&time.as_str()) {
        return Err("Choose a time".into());
    }
    if world.is_full(day, time) {
        return Err(format!("{day} {time} is full, choose another time"));
    }
    Ok(Booking {
        name,
        guests,
        day: day.clone(),
        time: time.clone(),
    })
}

fn when_form(entry: &Entry, error: Option<String>) -> Page {
    let form = Form {
        action: "/booking/review",
        method: Method::Post,
        hidden: vec![
            ("name", entry.name.clone()),
            ("guests", entry.guests.clone()),
        ],
        fields: vec![
            choice("Day", "day", days(), &entry.day),
            choice("Time", "time", times(), &entry.time),
        ],
        button: "Next",
    };
    step("Booking step 2 of 3", error, form)
}

fn review_form(entry: &Entry, booking: &Booking, error: Option<String>) -> Page {
    let form = Form {
        action: "/booking/confirm",
        method: Method::Post,
        hidden: vec![
            ("name", entry.name.clone()),
            ("guests", entry.guests.clone()),
            ("day", entry.day.clone()),
            ("time", entry.time.clone()),
        ],
        fields: vec![Field {
            label: "I agree",
            name: "agree",
            input: Input::Checkbox,
        }],
        button: "Confirm",
    };
    let mut page = step("Booking step 3 of 3", error, form);
    let place = page.blocks.len() - 1;
    page.blocks
        .insert(place, Block::Facts(facts_of(booking).into()));
    page
}

fn step(title: &str, error: Option<String>, form: Form) -> Page {
    let page = Page::new(title);
    let page = match error {
        Some(error) => page.with(Block::Alert(error)),
        None => page,
    };
    page.with(Block::Form(form))
}

fn facts_of(booking: &Booking) -> [Fact; 4] {
    let fact = |name, value, id| Fact { name, value, id };
    [
        fact("Name", booking.name.clone(), "booked-name"),
        fact("Guests", booking.guests.to_string(), "booked-guests"),
        fact("Day", booking.day.clone(), "booked-day"),
        fact("Time", booking.time.clone(), "booked-time"),
    ]
}

fn text(label: &'static str, name: &'static str, value: &str) -> Field {
    Field {
        label,
        name,
        input: Input::Text(value.to_owned()),
    }
}

fn choice(label: &'static str, name: &'static str, values: &[&str], chosen: &str) -> Field {
    let none = (String::new(), "Choose".to_owned());
    let options = values.iter().map(|v| ((*v).to_owned(), (*v).to_owned()));
    Field {
        label,
        name,
        input: Input::Select {
            options: std::iter::once(none).chain(options).collect(),
            chosen: chosen.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(world: &World) -> Entry {
        let free = times().iter().find(|time| !world.is_full("Monday", time));
        Entry {
            name: "Ada Hill".into(),
            guests: "3".into(),
            day: "Monday".into(),
            time: (*free.unwrap()).into(),
            agree: "yes".into(),
        }
    }

    fn alert(page: &Page) -> Option<&str> {
        page.blocks.iter().find_map(|block| match block {
            Block::Alert(text) => Some(text.as_str()),
            _ => None,
        })
    }

    #[test]
    fn a_good_booking_is_confirmed_with_its_code() {
        let world = World::new(7);
        let page = confirm(&world, &entry(&world));
        assert_eq!(page.title, "Booking confirmed");
        let booking = check_all(&world, &entry(&world)).unwrap();
        let Block::Facts(facts) = &page.blocks[0] else {
            panic!("{page:?}");
        };
        assert_eq!(facts[0].value, world.booking_code(&booking));
    }

    #[test]
    fn each_wrong_field_leads_back_to_its_own_step() {
        let world = World::new(7);
        type Change = fn(&mut Entry);
        let cases: [(Change, &str, &str); 7] = [
            (|e| e.name = "Ada".into(), "1 of 3", "Name must"),
            (|e| e.name = "Ada <b>".into(), "1 of 3", "Name must"),
            (|e| e.guests = "9".into(), "1 of 3", "Guests must"),
            (|e| e.guests = "two".into(), "1 of 3", "Guests must"),
            (|e| e.day = "Sunday".into(), "2 of 3", "Choose a day"),
            (|e| e.time = String::new(), "2 of 3", "Choose a time"),
            (|e| e.agree = String::new(), "3 of 3", "Tick the box"),
        ];
        for (change, title, message) in cases {
            let mut entry = entry(&world);
            change(&mut entry);
            let page = confirm(&world, &entry);
            assert!(page.title.ends_with(title), "{entry:?}: {}", page.title);
            assert!(alert(&page).unwrap().starts_with(message), "{entry:?}");
        }
    }

    #[test]
    fn a_full_time_is_refused() {
        let world = World::new(7);
        let (day, time) = days()
            .iter()
            .flat_map(|day| times().iter().map(move |time| (*day, *time)))
            .find(|(day, time)| world.is_full(day, time))
            .unwrap();
        let entry = Entry {
            day: day.into(),
            time: time.into(),
            ..entry(&world)
        };
        let page = review(&world, &entry);
        assert_eq!(page.title, "Booking step 2 of 3");
        assert!(alert(&page).unwrap().contains("is full"));
    }
}
