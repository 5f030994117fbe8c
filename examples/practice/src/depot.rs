//! The depot: parcels that are found, read and signed for in the way that this site happens to have.
//!
//! Three things differ from site to site and no page says which way round they are: which list leads to a parcel, which of
//! its codes the driver needs, and which button signs for it. Who was told, or has worked here before, knows.

use crate::draw::{Draw, hash};
use crate::words::{ANIMALS, COLOURS, FIRST_NAMES, PLACES, TREES};

/// Groups of a list, and parcels of a group: a list fits in a small snapshot.
const GROUPS: usize = 12;

/// A parcel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// Two words, unique in the depot.
    pub name: String,
    /// The hall that it lies in.
    pub hall: &'static str,
    /// The crew that brought it.
    pub crew: &'static str,
    /// Who booked it in.
    pub clerk: &'static str,
    /// Its weight.
    pub weight: u64,
    /// A number for each of [`Code::ALL`].
    pub codes: [u64; 4],
    /// What whoever signs for it is given.
    pub receipt: u64,
}

impl Parcel {
    /// The parcel's part of its address.
    pub fn slug(&self) -> String {
        crate::world::slug(&self.name)
    }

    /// Its number of that name.
    pub fn code(&self, code: Code) -> u64 {
        self.codes[code as usize]
    }
}

/// What leads to a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Its name, typed into the search.
    Search,
    /// The list of its hall.
    Halls,
    /// The list of its crew.
    Crews,
    /// The list of its clerk.
    Clerks,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 4] = [Self::Search, Self::Halls, Self::Crews, Self::Clerks];

    /// The name that the page and the hints have for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Search => "Search",
            Self::Halls => "Halls",
            Self::Crews => "Crews",
            Self::Clerks => "Clerks",
        }
    }

    /// The list of that name in lower case; the search is none.
    pub fn list(name: &str) -> Option<Self> {
        Self::ALL[1..]
            .iter()
            .copied()
            .find(|way| way.label().eq_ignore_ascii_case(name))
    }

    /// The group of that list in which a parcel is.
    pub fn group(self, parcel: &Parcel) -> &'static str {
        match self {
            Self::Search => "",
            Self::Halls => parcel.hall,
            Self::Crews => parcel.crew,
            Self::Clerks => parcel.clerk,
        }
    }
}

/// A number on a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The first of them.
    Gate,
    /// The second.
    Lane,
    /// The third.
    Dock,
    /// The fourth.
    Rack,
}

impl Code {
    /// All of them.
    pub const ALL: [Code; 4] = [Self::Gate, Self::Lane, Self::Dock, Self::Rack];

    /// The name that pages and hints have for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Gate => "Gate",
            Self::Lane => "Lane",
            Self::Dock => "Dock",
            Self::Rack => "Rack",
        }
    }
}

/// A button that may sign for a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// The first of them.
    Keep,
    /// The second.
    Send,
    /// The third.
    Hold,
    /// The fourth.
    Free,
}

impl Sign {
    /// All of them.
    pub const ALL: [Sign; 4] = [Self::Keep, Self::Send, Self::Hold, Self::Free];

    /// The text on the button.
    pub fn label(self) -> &'static str {
        match self {
            Self::Keep => "Keep",
            Self::Send => "Send",
            Self::Hold => "Hold",
            Self::Free => "Free",
        }
    }
}

/// The depot of one site.
#[derive(Clone, Debug)]
pub struct Depot {
    /// Its parcels, by name.
    pub parcels: Vec<Parcel>,
    /// What leads to a parcel here.
    pub way: Way,
    /// The number that drivers need here.
    pub code: Code,
    /// The button that signs here.
    pub sign: Sign,
}

impl Depot {
    /// The depot of the site of `seed`.
    pub fn new(seed: u64) -> Self {
        let of_four = |label| (hash(seed, label) % 4) as usize;
        Self {
            parcels: parcels(seed),
            way: Way::ALL[of_four("depot way")],
            code: Code::ALL[of_four("depot code")],
            sign: Sign::ALL[of_four("depot sign")],
        }
    }

    /// The parcel at `slug`.
    pub fn parcel(&self, slug: &str) -> Option<&Parcel> {
        self.parcels.iter().find(|parcel| parcel.slug() == slug)
    }

    /// The groups of a list, sorted.
    pub fn groups(&self, way: Way) -> Vec<&'static str> {
        let mut groups: Vec<_> = self.parcels.iter().map(|p| way.group(p)).collect();
        groups.sort_unstable();
        groups.dedup();
        groups
    }
}

fn parcels(seed: u64) -> Vec<Parcel> {
    let mut draw = Draw::new(seed, "depot");
    let (mut colours, mut animals) = (COLOURS, ANIMALS);
    draw.shuffle(&mut colours);
    draw.shuffle(&mut animals);
    let (mut halls, mut crews, mut clerks) = (PLACES, TREES, FIRST_NAMES);
    draw.shuffle(&mut halls);
    draw.shuffle(&mut crews);
    draw.shuffle(&mut clerks);
    // Each group has as many parcels as there are groups, no two lists group alike, and in none do two parcels begin alike:
    // steps of one and two through the colours never meet within a group, and of one and three not in both words.
    let mut parcels: Vec<Parcel> = (0..GROUPS * GROUPS)
        .map(|n| Parcel {
            name: {
                let (row, column) = (n / GROUPS, n % GROUPS);
                let colour = colours[(column + 2 * row) % colours.len()];
                format!("{colour} {}", animals[(column + 3 * row) % animals.len()])
            },
            hall: halls[n % GROUPS],
            crew: crews[n / GROUPS],
            clerk: clerks[(n + n / GROUPS) % GROUPS],
            weight: draw.between(100, 999),
            codes: [(); 4].map(|()| draw.between(100, 999)),
            receipt: draw.between(100, 999),
        })
        .collect();
    parcels.sort_by(|a, b| a.name.cmp(&b.name));
    parcels
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_list_has_twelve_groups_of_twelve() {
        let depot = Depot::new(7);
        let names: HashSet<_> = depot.parcels.iter().map(|p| &p.name).collect();
        assert_eq!(names.len(), 144);
        for way in &Way::ALL[1..] {
            let groups = depot.groups(*way);
            assert_eq!(groups.len(), 12);
            for group in groups {
                let of = |p: &&Parcel| way.group(p) == group;
                let names = depot.parcels.iter().filter(of).map(|p| &p.name);
                let first: HashSet<_> = names.map(|name| name.split(' ').next()).collect();
                assert_eq!(first.len(), 12, "{group}");
            }
        }
    }

    #[test]
    fn sites_differ_in_all_three_ways() {
        let depots: Vec<Depot> = (0..64).map(Depot::new).collect();
        for n in 0..4 {
            assert!(depots.iter().any(|depot| depot.way == Way::ALL[n]));
            assert!(depots.iter().any(|depot| depot.code == Code::ALL[n]));
            assert!(depots.iter().any(|depot| depot.sign == Sign::ALL[n]));
        }
    }
}
