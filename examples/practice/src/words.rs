//! The words that names are made of: short, common, and without two that share a beginning by accident.
//!
//! Only data. Names are joined from whole words, so that copying one from a page into a field stays easy for a small
//! model.

/// First words of product names and of code words.
pub(crate) const COLOURS: [&str; 24] = [
    "amber", "ash", "beige", "black", "blue", "bronze", "brown", "coral", "cream", "gold", "green",
    "grey", "indigo", "ivory", "lime", "navy", "olive", "pink", "plum", "red", "rose", "silver",
    "teal", "white",
];

/// Categories of the shop, each with the things sold in it.
pub(crate) const CATEGORIES: [(&str, [&str; 3]); 8] = [
    ("Lamps", ["lamp", "lantern", "torch"]),
    ("Seats", ["chair", "stool", "bench"]),
    ("Cups", ["mug", "glass", "bowl"]),
    ("Bags", ["bag", "basket", "purse"]),
    ("Hats", ["hat", "cap", "scarf"]),
    ("Clocks", ["clock", "watch", "timer"]),
    ("Rugs", ["rug", "mat", "quilt"]),
    ("Tools", ["hammer", "saw", "drill"]),
];

/// Makers of products, and teams of the crew.
pub(crate) const TREES: [&str; 24] = [
    "alder", "aspen", "beech", "birch", "cedar", "cherry", "cypress", "elm", "fir", "hazel",
    "holly", "juniper", "larch", "laurel", "linden", "maple", "myrtle", "oak", "pine", "poplar",
    "rowan", "spruce", "walnut", "willow",
];

/// First names of people.
pub(crate) const FIRST_NAMES: [&str; 24] = [
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gail", "Hugo", "Iris", "Jack", "Kira", "Leo",
    "Mona", "Nils", "Olga", "Paul", "Rita", "Sam", "Tara", "Uma", "Vera", "Will", "Yara", "Zoe",
];

/// Family names of people.
pub(crate) const LAST_NAMES: [&str; 24] = [
    "Adams", "Baker", "Cole", "Doyle", "Ellis", "Ford", "Grant", "Hill", "Irwin", "Jones", "King",
    "Lane", "Mason", "North", "Owens", "Price", "Quinn", "Reed", "Stone", "Turner", "Usher",
    "Vance", "Wood", "Young",
];

/// Towns of the crew, and places of notices, reports and rooms.
pub(crate) const PLACES: [&str; 24] = [
    "bay", "bridge", "canyon", "castle", "cliff", "coast", "creek", "desert", "dune", "farm",
    "field", "forest", "garden", "harbor", "hill", "island", "lake", "market", "meadow",
    "mountain", "port", "river", "valley", "village",
];

/// Second words of code words and passwords.
pub(crate) const ANIMALS: [&str; 24] = [
    "badger", "bear", "crane", "crow", "deer", "dove", "eagle", "falcon", "fox", "goose", "hare",
    "hawk", "horse", "lynx", "mole", "otter", "owl", "rabbit", "raven", "seal", "swan", "tiger",
    "whale", "wolf",
];

/// Days on which the booking desk is open.
pub(crate) const DAYS: [&str; 6] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// Times that can be booked.
pub(crate) const TIMES: [&str; 6] = ["morning", "noon", "afternoon", "evening", "dusk", "night"];

/// Plans of accounts.
pub(crate) const PLANS: [&str; 4] = ["basic", "family", "school", "travel"];
