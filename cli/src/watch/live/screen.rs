//! A look as lines of text that fit a width and a height. Pure.

use super::look::Look;
use super::parts;
use super::rates::Rates;
use super::table::{Table, fit, per_second};
use super::view::{Part, Size, View};
use crate::output::count;

/// Below this many lines there is no room to say which keys there are.
const HELP_ROWS_MIN: usize = 6;

/// Lays a look out in at most `height` lines of at most `width` columns.
pub fn lay_out(look: &Look, rates: &Rates, width: usize, height: usize) -> Vec<String> {
    let tables = vec![
        parts::queues(look, rates),
        parts::batches(look, rates),
        parts::workers(look, rates),
    ];
    under_each_other(&head(look, rates), tables, width, height)
}

/// The same as somebody chose to see it, without a word of keys.
pub fn lay_out_view(
    look: &Look,
    rates: &Rates,
    view: &View,
    width: usize,
    height: usize,
) -> Vec<String> {
    let chosen = |table: Table| {
        let table = table.filtered(&view.filter);
        match view.sort {
            Some(column) => table.sorted(column, view.reversed),
            None => table,
        }
    };
    let tables = match view.part {
        Part::All => all(look, rates)
            .into_iter()
            .map(|table| table.filtered(&view.filter))
            .collect(),
        part => vec![chosen(table(look, rates, part)).after(view.skipped)],
    };
    under_each_other(&head(look, rates), tables, width, height)
}

/// As on a terminal that is watched, with the keys in the last line.
pub fn lay_out_live(
    look: &Look,
    rates: &Rates,
    view: &View,
    width: usize,
    height: usize,
) -> Vec<String> {
    if height < HELP_ROWS_MIN {
        return lay_out_view(look, rates, view, width, height);
    }
    let mut lines = lay_out_view(look, rates, view, width, height - 1);
    lines.resize(height - 1, String::new());
    lines.push(fit(&view.help(), width));
    lines
}

/// How large the part is that is shown.
pub fn size(look: &Look, rates: &Rates, view: &View) -> Size {
    if view.part == Part::All {
        return Size::default();
    }
    let table = table(look, rates, view.part).filtered(&view.filter);
    Size {
        columns: table.header.len(),
        rows: table.rows.len(),
    }
}

/// A part by itself.
fn table(look: &Look, rates: &Rates, part: Part) -> Table {
    match part {
        Part::All | Part::Queues => parts::queues(look, rates),
        Part::Batches => parts::batches(look, rates),
        Part::Pipelines => parts::steps(look, rates),
        Part::Workers => parts::workers(look, rates),
        Part::Models => parts::served(look),
    }
}

/// All parts, without those that few systems have where there is nothing of them.
fn all(look: &Look, rates: &Rates) -> Vec<Table> {
    let mut tables: Vec<Table> = Part::EACH[1..]
        .iter()
        .map(|part| table(look, rates, *part))
        .collect();
    let mut seldom = [false, false, true, false, true].into_iter();
    tables.retain(|table| !seldom.next().unwrap_or_default() || !table.rows.is_empty());
    tables
}

fn under_each_other(
    head: &[String],
    tables: Vec<Table>,
    width: usize,
    height: usize,
) -> Vec<String> {
    let mut lines: Vec<String> = head.iter().map(|line| fit(line, width)).collect();
    // An empty line and a header for each.
    let left = height.saturating_sub(lines.len() + 2 * tables.len());
    let needs: Vec<usize> = tables.iter().map(|table| table.rows.len()).collect();
    for (table, rows) in tables.iter().zip(shares(&needs, left)) {
        lines.push(String::new());
        lines.extend(table.lines(width, rows));
    }
    lines.truncate(height);
    lines
}

/// What is left of `budget` for each of those that need so much: what one does not need is for the others.
fn shares(needs: &[usize], mut budget: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..needs.len()).collect();
    order.sort_by_key(|n| needs[*n]);
    let mut shares = vec![0; needs.len()];
    for (place, n) in order.into_iter().enumerate() {
        shares[n] = needs[n].min(budget / (needs.len() - place));
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
        let mut there = format!(
            " workers: {} at {} coordinators · {} of {} slots in use",
            count(workers.len() as u64),
            look.coordinators(),
            count(running.into()),
            count(capacity.into())
        );
        if let Some(dollars) = look.dollars_per_hour {
            there.push_str(&format!(" · {dollars:.2} $/h"));
        }
        lines.push(there);
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

fn maybe(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".to_owned(), per_second)
}

#[cfg(test)]
mod tests {
    use console::measure_text_width;
    use espalier_proto::v1;
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
        let lines = lay_out(&look, &Rates::default(), 80, 24).join("\n");
        assert!(lines.find(" older ") < lines.find(" b "), "{lines}");
    }

    #[test]
    fn columns_go_from_the_right() {
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
    }

    #[test]
    fn what_one_does_not_need_is_for_the_others() {
        assert_eq!(shares(&[1, 2, 3], 100), [1, 2, 3]);
        assert_eq!(shares(&[50, 1, 50], 21), [10, 1, 10]);
        assert_eq!(shares(&[5, 5], 0), [0, 0]);
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

    fn view(part: Part) -> View {
        View {
            part,
            ..View::default()
        }
    }

    /// A system with a pipeline, a served model and prices.
    fn busy() -> Look {
        let mut look = many(3);
        look.batches.push(v1::Batch {
            batch: "shop.train.0123456789ab".to_owned(),
            project: "shop".to_owned(),
            ..look.batches[0].clone()
        });
        look.dollars_per_hour = Some(4.12);
        let serving = v1::Serving {
            url: "http://10.0.0.7:8000/v1".to_owned(),
            models: vec!["qwen".to_owned()],
            ..v1::Serving::default()
        };
        look.workers.as_mut().unwrap()[0].serving = Some(serving);
        look
    }

    #[test]
    fn a_part_is_shown_alone_as_it_was_chosen() {
        let (look, rates) = (busy(), Rates::default());
        let all = lay_out_view(&look, &rates, &View::default(), 200, 60).join("\n");
        for word in [
            "4.12 $/h",
            "READY",
            "BATCH",
            "PIPELINE  STEP",
            "WORKER",
            "http://10.0.0.7:8000/v1",
        ] {
            assert!(all.contains(word), "{word}: {all}");
        }
        let alone = lay_out_view(&look, &rates, &view(Part::Pipelines), 200, 60);
        assert_eq!(alone.len(), 5, "{alone:#?}");
        assert!(
            alone[4].starts_with(" shop      train  10 of 100"),
            "{alone:#?}"
        );
        let mut sorted = view(Part::Workers);
        (sorted.sort, sorted.reversed) = (Some(0), true);
        let lines = lay_out_view(&look, &rates, &sorted, 200, 60);
        assert!(
            lines[3].contains("WORKER▲") && lines[4].contains("-0002"),
            "{lines:#?}"
        );
        sorted.filter = "0001".to_owned();
        let lines = lay_out_view(&look, &rates, &sorted, 200, 60);
        assert!(lines.len() == 5 && lines[4].contains("-0001"), "{lines:#?}");
        sorted.filter.clear();
        sorted.skipped = 2;
        let lines = lay_out_view(&look, &rates, &sorted, 200, 60);
        assert!(lines.len() == 5 && lines[4].contains("-0000"), "{lines:#?}");
    }

    #[test]
    fn what_few_systems_have_is_left_out_where_there_is_none() {
        let look = look(Instant::now(), 0, 10, 0);
        let lines = lay_out_view(&look, &Rates::default(), &View::default(), 200, 60);
        let text = lines.join("\n");
        assert!(
            !text.contains("pipeline") && !text.contains("model"),
            "{text}"
        );
        let lines = lay_out_view(&look, &Rates::default(), &view(Part::Models), 200, 60);
        assert_eq!(lines[3], " no worker serves a model");
    }

    #[test]
    fn the_last_line_has_the_keys_where_there_is_room() {
        let look = busy();
        for height in [1, 5, 6, 24, 60] {
            for part in Part::EACH {
                let lines = lay_out_live(&look, &Rates::default(), &view(part), 80, height);
                assert!(lines.len() <= height);
                assert_eq!(lines.last().unwrap().contains("space stop"), height > 5);
                assert!(lines.iter().all(|line| measure_text_width(line) <= 80));
            }
        }
    }

    #[test]
    fn every_column_can_be_sorted_by_and_every_row_be_reached() {
        let look = busy();
        let of = |part| size(&look, &Rates::default(), &view(part));
        let columns = Part::EACH.map(|part| of(part).columns);
        assert_eq!(columns, [0, 11, 7, 8, 9, 4]);
        let rows = Part::EACH.map(|part| of(part).rows);
        assert_eq!(rows, [0, 1, 2, 1, 3, 1]);
    }
}
