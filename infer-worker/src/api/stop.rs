//! Stop strings in text that comes in pieces: no part of one is ever shown.

/// Looks for stop strings. What may be the start of one is held back until it is clear.
#[derive(Clone, Debug, Default)]
pub(super) struct StopText {
    stops: Vec<String>,
    held: String,
}

/// What may be shown, and whether a stop string follows it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) text: String,
    pub(super) stopped: bool,
}

impl StopText {
    /// None of `stops` is empty.
    pub(super) fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.to_vec(),
            held: String::new(),
        }
    }

    /// Takes the next piece. The stop string that ends first counts, the longest of those that end together, so that
    /// the result does not depend on where pieces are cut. After a stop nothing more may be pushed.
    pub(super) fn push(&mut self, piece: &str) -> Shown {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        if let Some(start) = self.first_stop(&text) {
            text.truncate(start);
            return Shown {
                text,
                stopped: true,
            };
        }
        self.held = text.split_off(text.len() - self.undecided(&text));
        Shown {
            text,
            stopped: false,
        }
    }

    /// What was held back, when no more comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    fn first_stop(&self, text: &str) -> Option<usize> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = text.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }

    /// Bytes at the end of `text` that may be the start of a stop string.
    fn undecided(&self, text: &str) -> usize {
        let starts = self.stops.iter().filter_map(|stop| {
            let ends = stop.char_indices().rev().map(|(end, _)| end);
            ends.filter(|end| *end > 0)
                .find(|end| text.ends_with(&stop[..*end]))
        });
        starts.max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut matcher = StopText::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            let step = matcher.push(piece);
            shown.push(step.text);
            if step.stopped {
                return (shown, true);
            }
        }
        shown.push(matcher.finish());
        (shown, false)
    }

    #[test]
    fn a_stop_over_several_pieces_never_shows_a_part() {
        let (shown, stopped) = run(&["\nUser:"], &["Hi", "\n", "Us", "er", ": no"]);
        assert_eq!(shown, ["Hi", "", "", "", ""]);
        assert!(stopped);
    }

    #[test]
    fn what_only_looked_like_a_stop_is_shown_after_all() {
        let (shown, stopped) = run(&["END"], &["a E", "N", "d"]);
        assert_eq!(shown, ["a ", "", "ENd", ""]);
        assert!(!stopped);
        assert_eq!(run(&["END"], &["a EN"]).0, ["a ", "EN"]);
    }

    #[test]
    fn the_stop_that_ends_first_counts_and_the_longest_of_equals() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]).0, ["xa"]);
        assert_eq!(run(&["c", "abc"], &["x", "a", "bc"]).0.concat(), "x");
    }

    #[test]
    fn pieces_may_end_between_any_characters() {
        assert_eq!(run(&["é€"], &["aé", "€b"]).0, ["a", ""]);
        assert_eq!(run(&["é€"], &["aé", "b"]).0, ["a", "éb", ""]);
    }

    proptest! {
        #[test]
        fn cutting_changes_nothing(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
            cuts in prop::collection::vec(0usize..25, 0..8),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (whole, stopped) = run(&stops, &[&text]);
            let mut ends: Vec<usize> = cuts.iter().map(|&cut| text.floor_char_boundary(cut)).collect();
            ends.push(0);
            ends.push(text.len());
            ends.sort_unstable();
            let pieces: Vec<&str> = ends.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            let (parts, stopped_too) = run(&stops, &pieces);
            prop_assert_eq!(parts.concat(), whole.concat());
            prop_assert_eq!(stopped_too, stopped);
            for stop in stops {
                prop_assert!(!parts.concat().contains(stop));
            }
        }
    }
}
