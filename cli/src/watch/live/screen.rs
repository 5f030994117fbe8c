//! A look as lines of text that fit a width and a height. Pure.
//!
//! What has no room is counted ("… 12 more"); columns that have none are left out, the least telling first; names are cut
//! in their middle, since their ends tell them apart.

use console::{measure_text_width, truncate_str};
use espalier_proto::v1;

use super::look::{Look, done, open};
use super::rates::Rates;
use crate::json;
use crate::output::{count, duration, plain};

/// Names are not cut below this many columns; rather a column is left out.
const NAME_MIN: usize = 16;
/// Between two columns.
const GAP: usize = 2;
/// Of a coordinator's id, its last characters tell it apart.
const COORDINATOR_CHARS: usize = 8;
/// A worker is heard every few seconds, and told of in steps of five.
const NOW_MS: u64 = 10_000;

/// Rows under a header, the most telling columns first; what to say where there are none.
struct Table {
    header: &'static [&'static str],
    rows: Vec<Vec<String>>,
    none: &'static str,
}

/// Lays a look out in at most `height` lines of at most `width` columns.
pub fn lay_out(look: &Look, rates: &Rates, width: usize, height: usize) -> Vec<String> {
    let tables = [
        queues(look, rates),
        batches(look, rates),
        workers(look, rates),
    ];
    let mut lines: Vec<String> = head(look, rates).iter().map(|l| fit(l, width)).collect();
    // An empty line and a header for each.
    let left = height.saturating_sub(lines.len() + 2 * tables.len());
    let needs = tables.each_ref().map(|table| table.rows.len());
    for (table, rows) in tables.iter().zip(shares(needs, left)) {
        lines.push(String::new());
        lines.extend(table.lines(width, rows));
    }
    lines.truncate(height);
    lines
}

/// `text`, cut to `width` columns.
pub fn fit(text: &str, width: usize) -> String {
    truncate_str(&plain(text), width, "…").into_owned()
}

/// What is left of `budget` for each of those that need so much: what one does not need is for the others.
fn shares<const N: usize>(needs: [usize; N], mut budget: usize) -> [usize; N] {
    let mut order: Vec<usize> = (0..N).collect();
    order.sort_by_key(|n| needs[*n]);
    let mut shares = [0; N];
    for (place, n) in order.into_iter().enumerate() {
        shares[n] = needs[n].min(budget / (N - place));
        budget -= shares[n];
    }
    shares
}

/// Who is there, and what happens.
fn head(look: &Look, rates: &Rates) -> Vec<String> {
    let mut lines = Vec::new();
    let mut happens = Vec::new();
    if let Some(workers) = &look.workers {
        let running: u32 = workers.iter().map(|worker| worker.running).sum();
        let capacity: u32 = workers.iter().map(|worker| worker.capacity).sum();
        lines.push(format!(
            " workers: {} at {} coordinators · {} of {} slots in use",
            count(workers.len() as u64),
            look.coordinators(),
            count(running.into()),
            count(capacity.into())
        ));
        happens.push(format!("{} grants/s", maybe(rates.grants)));
    }
    happens.push(format!("{} ends/s", maybe(rates.ends)));
    happens.push(match look.open_questions {
        0 => "no open questions".to_owned(),
        n => format!("{n} open questions: espalier questions"),
    });
    lines.push(format!(" {}", happens.join(" · ")));
    lines
}

fn queues(look: &Look, rates: &Rates) -> Table {
    let mut queues: Vec<&v1::QueueStats> = look.queues.iter().collect();
    let open = |queue: &v1::QueueStats| queue.ready + queue.leased + queue.delayed + queue.blocked;
    queues.sort_by_key(|queue| std::cmp::Reverse(open(queue)));
    let row = |queue: &&v1::QueueStats| {
        let oldest = match queue.oldest_ready_ms {
            0 => "-".to_owned(),
            ms => duration(ms),
        };
        vec![
            queue.project.clone(),
            json::kind(queue.kind()).to_owned(),
            count(queue.ready),
            count(queue.leased),
            count(queue.dead),
            maybe(rates.ends_of(queue)),
            oldest,
            count(queue.delayed),
            count(queue.blocked),
            count(queue.succeeded),
            count(queue.cancelled),
        ]
    };
    Table {
        header: &[
            "project",
            "kind",
            "ready",
            "running",
            "dead",
            "ends/s",
            "oldest waits",
            "delayed",
            "blocked",
            "succeeded",
            "cancelled",
        ],
        rows: queues.iter().map(row).collect(),
        none: "no jobs",
    }
}

fn batches(look: &Look, rates: &Rates) -> Table {
    let mut batches: Vec<&v1::Batch> = look.batches.iter().collect();
    // Newest first they come, and those of which something runs are to be seen first.
    batches.sort_by_key(|batch| batch.counts.is_none_or(|counts| counts.leased == 0));
    let row = |batch: &v1::Batch| {
        let counts = batch.counts.unwrap_or_default();
        let left = rates.left_s(batch);
        vec![
            batch.batch.clone(),
            format!(
                "{} of {}",
                count(done(batch)),
                count(done(batch) + open(batch))
            ),
            count(counts.leased),
            count(counts.dead),
            maybe(rates.of_batch(batch)),
            left.map_or_else(|| "-".to_owned(), |s| duration((s * 1_000.0) as u64)),
            batch.project.clone(),
        ]
    };
    Table {
        header: &[
            "batch", "done", "running", "dead", "ends/s", "left", "project",
        ],
        rows: batches.into_iter().map(row).collect(),
        none: "no batch in progress",
    }
}

fn workers(look: &Look, rates: &Rates) -> Table {
    let row = |worker: &v1::Worker| {
        let kinds: Vec<&str> = worker.kinds().map(json::kind).collect();
        let seen = match look.silent_ms(worker) {
            0..NOW_MS => "now".to_owned(),
            ms => format!("{} ago", duration(ms - ms % 1_000)),
        };
        vec![
            worker.worker.clone(),
            format!("{} of {}", worker.running, worker.capacity),
            if worker.draining { "draining" } else { "ready" }.to_owned(),
            seen,
            end_of(&worker.coordinator),
            maybe(rates.of_worker(worker)),
            kinds.join(" "),
            worker.version.clone(),
        ]
    };
    Table {
        header: &[
            "worker",
            "running",
            "state",
            "heard",
            "coordinator",
            "grants/s",
            "kinds",
            "version",
        ],
        rows: look.workers.iter().flatten().map(row).collect(),
        none: match look.workers {
            Some(_) => "no workers are connected",
            None => "workers are shown to tokens for all projects",
        },
    }
}

impl Table {
    /// The header and at most `rows` lines under it.
    fn lines(&self, width: usize, rows: usize) -> Vec<String> {
        if self.rows.is_empty() {
            return vec![fit(&format!(" {}", self.none), width)];
        }
        let all = self.rows.len();
        // The line that counts the rest takes the place of a row.
        let shown = if rows < all {
            rows.saturating_sub(1)
        } else {
            all
        };
        let header: Vec<String> = self.header.iter().map(|name| name.to_uppercase()).collect();
        let mut cells: Vec<Vec<String>> = vec![header];
        let seen = self.rows.iter().take(shown);
        cells.extend(seen.map(|row| row.iter().map(|cell| plain(cell)).collect()));
        let widths = widths(&cells, width);
        let mut lines: Vec<String> = cells.iter().map(|row| line(row, &widths)).collect();
        if shown < all && rows > 0 {
            lines.push(fit(
                &format!(" … {} more", count((all - shown) as u64)),
                width,
            ));
        }
        lines.iter().map(|line| fit(line, width)).collect()
    }
}

/// Widths of the columns that have room, the first of which may be cut.
fn widths(cells: &[Vec<String>], width: usize) -> Vec<usize> {
    let columns = cells.first().map_or(0, Vec::len);
    let widest = |n: usize| cells.iter().map(|row| measure_text_width(&row[n])).max();
    let mut widths: Vec<usize> = (0..columns).filter_map(widest).collect();
    let others = |widths: &[usize]| widths.iter().skip(1).map(|w| w + GAP).sum::<usize>() + 1;
    let name = widths.first().copied().unwrap_or_default();
    while widths.len() > 1 && others(&widths) + name.min(NAME_MIN) > width {
        widths.pop();
    }
    let room = width.saturating_sub(others(&widths));
    if let Some(first) = widths.first_mut() {
        *first = name.min(room);
    }
    widths
}

fn line(row: &[String], widths: &[usize]) -> String {
    let mut text = String::from(" ");
    for (n, (cell, width)) in row.iter().zip(widths).enumerate() {
        let cell = if n == 0 {
            cut_middle(cell, *width)
        } else {
            cell.clone()
        };
        let pad = width.saturating_sub(measure_text_width(&cell)) + GAP;
        text.push_str(&cell);
        text.extend(std::iter::repeat_n(' ', pad));
    }
    text.trim_end().to_owned()
}

/// `text` in `width` columns, without its middle where it is longer.
fn cut_middle(text: &str, width: usize) -> String {
    if measure_text_width(text) <= width {
        return text.to_owned();
    }
    let all: Vec<char> = text.chars().collect();
    // Wide characters take more room than one, so that the cut goes on until it fits.
    for kept in (0..width.min(all.len())).rev() {
        let (head, tail) = (kept.div_ceil(2), kept / 2);
        let cut: String = all[..head]
            .iter()
            .chain(&['…'])
            .chain(&all[all.len() - tail..])
            .collect();
        if measure_text_width(&cut) <= width {
            return cut;
        }
    }
    String::new()
}

fn end_of(id: &str) -> String {
    let skipped = id.chars().count().saturating_sub(COORDINATOR_CHARS);
    id.chars().skip(skipped).collect()
}

fn maybe(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".to_owned(), per_second)
}

fn per_second(rate: f64) -> String {
    match rate {
        100.0.. => count(rate.round() as u64),
        1.0.. => format!("{rate:.1}"),
        _ => format!("{rate:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::super::rates::tests::look;
    use super::*;

    #[test]
    fn golden_screen() {
        let start = Instant::now();
        let (before, after) = (look(start, 0, 10, 12), look(start, 4, 30, 40));
        let rates = Rates::between(&before, &after);
        let expected = [
            " workers: 1 at 1 coordinators · 0 of 4 slots in use",
            " 7.0 grants/s · 5.0 ends/s · no open questions",
            "",
            " PROJECT  KIND     READY  RUNNING  DEAD  ENDS/S  OLDEST WAITS  DELAYED  BLOCKED",
            " shop     rollout  70     0        0     5.0     -             0        0",
            "",
            " BATCH  DONE       RUNNING  DEAD  ENDS/S  LEFT    PROJECT",
            " b      30 of 100  0        0     5.0     14.0 s  shop",
            "",
            " WORKER  RUNNING  STATE  HEARD  COORDINATOR  GRANTS/S  KINDS  VERSION",
            " w       0 of 4   ready  now    aaaaaaaa     7.0",
        ];
        assert_eq!(lay_out(&after, &rates, 80, 24), expected);
    }

    fn many(workers: usize) -> Look {
        let mut look = look(Instant::now(), 0, 10, 0);
        look.workers = Some(
            (0..workers)
                .map(|n| v1::Worker {
                    worker: format!("agent-worker-on-a-host-with-a-long-name-{n:04}"),
                    kinds: vec![v1::JobKind::Rollout.into()],
                    version: "0.1.0".to_owned(),
                    ..Default::default()
                })
                .collect(),
        );
        look
    }

    #[test]
    fn it_fits_every_width_and_height_and_counts_the_rest() {
        let mut look = many(300);
        let batch = look.batches[0].clone();
        look.batches = vec![batch; 40];
        for width in [1, 10, 20, 40, 80, 200] {
            for height in [1, 2, 5, 10, 24, 50, 1_000] {
                let lines = lay_out(&look, &Rates::default(), width, height);
                assert!(lines.len() <= height, "{width}x{height}");
                for line in &lines {
                    let wide = measure_text_width(line);
                    assert!(wide <= width, "{width}x{height}: {line}");
                }
            }
        }
        let lines = lay_out(&look, &Rates::default(), 80, 24);
        assert_eq!(lines.len(), 24, "no room is wasted: {lines:#?}");
        assert_eq!(lines[13], " … 34 more");
        assert_eq!(lines[23], " … 293 more");
    }

    #[test]
    fn what_runs_stands_above_what_waits() {
        let mut look = look(Instant::now(), 0, 10, 0);
        let mut running = look.batches[0].clone();
        running.batch = "older".to_owned();
        running.counts.as_mut().unwrap().leased = 1;
        look.batches.push(running);
        let rows = batches(&look, &Rates::default()).rows;
        assert_eq!([&rows[0][0], &rows[1][0]], ["older", "b"]);
    }

    #[test]
    fn names_lose_their_middle_and_columns_go_from_the_right() {
        let lines = lay_out(&many(1), &Rates::default(), 40, 24);
        let worker = lines.last().unwrap();
        assert!(
            worker.starts_with(" agent-") && worker.contains("-0000  "),
            "{worker}"
        );
        assert!(
            worker.contains("ready") && !worker.contains("0.1.0"),
            "{worker}"
        );
        assert_eq!(cut_middle("abcdefgh", 5), "ab…gh");
        assert_eq!(cut_middle("日本語日本語", 5), "日…語");
        assert_eq!(cut_middle("abc", 0), "");
    }

    #[test]
    fn what_one_does_not_need_is_for_the_others() {
        assert_eq!(shares([1, 2, 3], 100), [1, 2, 3]);
        assert_eq!(shares([50, 1, 50], 21), [10, 1, 10]);
        assert_eq!(shares([5, 5], 0), [0, 0]);
    }

    #[test]
    fn nothing_is_said_in_words() {
        let mut look = many(0);
        (look.queues, look.batches) = (Vec::new(), Vec::new());
        let lines = lay_out(&look, &Rates::default(), 80, 24).join("\n");
        for words in [
            "no jobs",
            "no batch in progress",
            "no workers are connected",
        ] {
            assert!(lines.contains(words), "{lines}");
        }
        look.workers = None;
        let lines = lay_out(&look, &Rates::default(), 80, 24).join("\n");
        assert!(lines.contains("tokens for all projects"), "{lines}");
    }

    #[test]
    fn rates_are_as_exact_as_they_are_large() {
        let shown = [0.066, 0.0, 4.24, 99.96, 1234.5].map(per_second);
        assert_eq!(shown, ["0.07", "0.00", "4.2", "100.0", "1,235"]);
    }
}
