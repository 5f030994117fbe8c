//! Memory of this process, as Linux tells it.

use std::io;

/// Bytes that are in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resident {
    /// The most that there were, the program's own pages among them.
    peak: u64,
    /// Of files: the program itself.
    of_files: u64,
    anonymous: u64,
}

impl Resident {
    /// As it is now.
    pub(super) fn now() -> io::Result<Self> {
        std::fs::read_to_string("/proc/self/status").map(|text| Self::parse(&text))
    }

    fn parse(status: &str) -> Self {
        let bytes = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name));
            let kib =
                value.and_then(|value| value.trim().trim_end_matches("kB").trim().parse().ok());
            kib.map_or(0, |kib: u64| kib * 1024)
        };
        Self {
            peak: bytes("VmHWM:"),
            of_files: bytes("RssFile:"),
            anonymous: bytes("RssAnon:"),
        }
    }

    /// Bytes that were taken since `before`, at most, without the program's own pages.
    pub(super) fn taken_since(&self, before: &Self) -> u64 {
        self.peak
            .saturating_sub(self.of_files)
            .saturating_sub(before.anonymous)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_the_peak_without_files_and_what_was_there() {
        let of = |peak, of_files, anonymous| {
            Resident::parse(&format!(
                "Name:\tx\nVmHWM:\t  {peak} kB\nRssAnon:\t{anonymous} kB\nRssFile:\t {of_files} kB\n"
            ))
        };
        let (before, after) = (of(900, 500, 300), of(2000, 600, 400));
        assert_eq!(after.taken_since(&before), 1100 * 1024);
        assert_eq!(before.taken_since(&after), 0);
    }

    #[test]
    fn memory_that_is_written_is_seen() {
        let before = Resident::now().unwrap();
        let written = std::hint::black_box(vec![1_u8; 64 << 20]);
        let taken = Resident::now().unwrap().taken_since(&before);
        assert!(taken >= 60 << 20, "{taken} of {}", written.len());
    }
}
