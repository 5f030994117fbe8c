//! The report as one page: plots are SVG within it, and it fetches nothing and runs nothing, which it also forbids itself.

use std::fmt::Write;

use espalier_core::compare::markup::{POLICY, STYLE, escaped, html_table};
use espalier_core::compare::words::{self, kind_name};
use espalier_core::compare::{Both, Bucket, Estimate, Group, Report, Side};
use espalier_core::plot;

use super::talk::{Talk, Turn};
use super::write::{arms, gate_words, headline, outcome};

const BEFORE: &str = "#8a8f98";
const AFTER: &str = "#1f5fa8";
const WIDTH: f64 = 760.0;
/// Room of the names on the left.
const LEFT: f64 = 170.0;
const RIGHT: f64 = 30.0;
/// Height of a row of a plot.
const ROW: f64 = 34.0;
/// Longest name in a plot, in characters.
const NAME_CHARS_MAX: usize = 24;
/// Kinds of tasks that a plot shows; the tables have all.
const KINDS_MAX: usize = 40;

/// The whole page.
pub(super) fn html(report: &Report, talks: &[Both<Talk>]) -> String {
    let title = format!(
        "{} and {}",
        report.arms.before.label, report.arms.after.label
    );
    let mut out = String::new();
    // Writing into a `String` cannot fail.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body>\
         <h1>{title}</h1><p>{}</p><p class=\"gate\">{}</p>",
        escaped(&headline(report)),
        escaped(&gate_words(report)),
        title = escaped(&title),
    );
    out.push_str("<h2>Success</h2>");
    out.push_str(&success_plot(report));
    out.push_str(&difference_plot(report));
    out.push_str(&html_table(&words::success(report)));
    let _ = write!(out, "<p class=\"small\">{}</p>", escaped(&report.method));
    let _ = write!(out, "<h2>Effort</h2>{}", html_table(&words::effort(report)));
    let _ = write!(
        out,
        "<h2>Difficulty</h2><p>Tasks by how often they were solved, of at most {} samples.</p>{}{}",
        report.comparison.difficulty.samples,
        difficulty_plot(report),
        html_table(&words::difficulty(report))
    );
    let left_out = words::left_out(report);
    if !left_out.rows.is_empty() {
        let _ = write!(out, "<h2>Left out</h2>{}", html_table(&left_out));
    }
    for loss in &report.losses {
        let _ = write!(out, "<h2>Training {}</h2>", escaped(&loss.job));
        out.push_str(&plot::svg("Loss by step", &loss.train, &loss.eval));
    }
    out.push_str("<h2>Traces side by side</h2>");
    for (pair, talk) in report.shown.iter().zip(talks) {
        let name = format!("{} s{}", pair.task, pair.sample);
        let _ = write!(
            out,
            "<details><summary>{} {}: {} → {}</summary><div class=\"both\">",
            escaped(kind_name(&pair.kind)),
            escaped(&name),
            colored(*pair.solved.at(Side::Before)),
            colored(*pair.solved.at(Side::After)),
        );
        for side in Side::ALL {
            one_side(
                &mut out,
                &report.arms.at(side).label,
                *pair.solved.at(side),
                talk.at(side),
            );
        }
        out.push_str("</div></details>");
    }
    let _ = write!(out, "<h2>Arms</h2>{}", html_table(&arms(report)));
    lineage(&mut out, report);
    out.push_str("</body></html>\n");
    out
}

fn colored(solved: bool) -> String {
    let what = outcome(solved);
    format!("<span class=\"{what}\">{what}</span>")
}

fn one_side(out: &mut String, label: &str, solved: bool, talk: &Talk) {
    let reason = match talk.reason.is_empty() {
        true => String::new(),
        false => format!(", {}", escaped(&talk.reason)),
    };
    let _ = write!(
        out,
        "<div><h3>{} ({})</h3><p>{}, stopped: {}{reason}</p>",
        escaped(label),
        escaped(&talk.model),
        colored(solved),
        escaped(&talk.stop),
    );
    for turn in &talk.turns {
        one_turn(out, turn);
    }
    let _ = write!(
        out,
        "<p class=\"small\">{}<br>sha256 {}</p></div>",
        escaped(&talk.file),
        escaped(&talk.sha256)
    );
}

fn one_turn(out: &mut String, turn: &Turn) {
    let role = turn.role;
    let _ = write!(
        out,
        "<div class=\"turn {role}\"><div class=\"role\">{role}</div>"
    );
    if !turn.thought.is_empty() {
        let _ = write!(
            out,
            "<div class=\"thought\">{}</div>",
            escaped(&turn.thought)
        );
    }
    out.push_str(&escaped(&turn.text));
    for call in &turn.calls {
        let _ = write!(out, "<div class=\"call\">→ {}</div>", escaped(call));
    }
    out.push_str("</div>");
}

fn lineage(out: &mut String, report: &Report) {
    let _ = write!(
        out,
        "<h2>Lineage</h2><p class=\"small\">Made by {} of {} traces. The digest of their digests: {}</p>\
         <details><summary>All traces</summary><table class=\"small\"><tr><th>sha256</th><th>trace</th></tr>",
        escaped(&report.job),
        report.sources.len(),
        escaped(&report.sources_sha256)
    );
    for source in &report.sources {
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td></tr>",
            escaped(&source.sha256),
            escaped(&source.path)
        );
    }
    out.push_str("</table></details>");
}

/// Groups as plots show them: kinds, then all.
fn groups(report: &Report) -> Vec<(&str, &Group)> {
    let kinds = report.comparison.kinds.iter();
    let mut groups: Vec<(&str, &Group)> = kinds
        .take(KINDS_MAX)
        .map(|(kind, group)| (kind_name(kind), group))
        .collect();
    if groups.len() != 1 {
        groups.push(("all", &report.comparison.pooled));
    }
    groups
}

/// A picture of `rows` rows whose axis spans `low..=high`, marked at five places.
struct Chart {
    out: String,
    span: (f64, f64),
}

impl Chart {
    fn new(title: &str, rows: usize, span: (f64, f64)) -> Self {
        let bottom = ROW * (rows as f64 + 1.0);
        let mut chart = Self {
            out: String::new(),
            span,
        };
        let height = bottom + 30.0;
        let _ = write!(
            chart.out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
             font-family=\"sans-serif\" font-size=\"12\" role=\"img\"><text x=\"0\" y=\"16\" font-size=\"14\">{}</text>",
            escaped(title)
        );
        for n in 0..=4 {
            let value = span.0 + (span.1 - span.0) * f64::from(n) / 4.0;
            let x = chart.x(value);
            let _ = write!(
                chart.out,
                "<path d=\"M{x:.1} 26V{bottom:.1}\" stroke=\"#e5e5e5\"/><text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0}</text>",
                bottom + 18.0,
                value * 100.0
            );
        }
        chart
    }

    fn x(&self, value: f64) -> f64 {
        let (low, high) = self.span;
        LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)
    }

    fn name(&mut self, row: usize, name: &str) {
        let name: String = name.chars().take(NAME_CHARS_MAX).collect();
        let y = y(row) + 4.0;
        let _ = write!(
            self.out,
            "<text x=\"0\" y=\"{y:.1}\">{}</text>",
            escaped(&name)
        );
    }

    /// An interval with its estimate, a little above or below the middle of its row.
    fn interval(&mut self, row: usize, shift: f64, of: &Estimate, color: &str) {
        let y = y(row) + shift;
        let [low, value, high] = [of.low, of.value, of.high].map(|value| self.x(value));
        let _ = write!(
            self.out,
            "<path d=\"M{low:.1} {y:.1}H{high:.1}\" stroke=\"{color}\" stroke-width=\"3\"/><circle cx=\"{value:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"{color}\"/>"
        );
    }

    fn bar(&mut self, row: usize, (from, to): (f64, f64), color: &str, text: &str) {
        let (from, to, y) = (self.x(from), self.x(to), y(row) - 10.0);
        let _ = write!(
            self.out,
            "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"20\" fill=\"{color}\"/>",
            to - from
        );
        if to - from > 24.0 {
            let _ = write!(
                self.out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#fff\">{}</text>",
                f64::midpoint(from, to),
                y + 14.0,
                escaped(text)
            );
        }
    }

    fn line_at(&mut self, value: f64, rows: usize, color: &str) {
        let (x, bottom) = (self.x(value), ROW * (rows as f64 + 1.0));
        let _ = write!(
            self.out,
            "<path d=\"M{x:.1} 26V{bottom:.1}\" stroke=\"{color}\" stroke-dasharray=\"4 3\"/>"
        );
    }

    fn end(mut self) -> String {
        self.out.push_str("</svg>");
        self.out
    }
}

fn y(row: usize) -> f64 {
    ROW * (row as f64 + 1.0) + 8.0
}

fn success_plot(report: &Report) -> String {
    let groups = groups(report);
    let title = format!(
        "Solved, in %: {} (grey) and {} (blue)",
        report.arms.before.label, report.arms.after.label
    );
    let mut chart = Chart::new(&title, groups.len(), (0.0, 1.0));
    for (row, (name, group)) in groups.into_iter().enumerate() {
        chart.name(row, name);
        chart.interval(row, -5.0, &group.success.before, BEFORE);
        chart.interval(row, 5.0, &group.success.after, AFTER);
    }
    chart.end()
}

fn difference_plot(report: &Report) -> String {
    let groups = groups(report);
    let ends = groups.iter().map(|(_, group)| group.difference);
    let widest = ends
        .map(|d| d.low.abs().max(d.high.abs()))
        .fold(0.05, f64::max);
    // A round span, and a place for zero in the middle of it.
    let widest = (widest * 10.0).ceil() / 10.0;
    let count = groups.len();
    let mut chart = Chart::new("Difference in points, by task", count, (-widest, widest));
    chart.line_at(0.0, count, "#555");
    let gate = report.gate.settings.min_difference;
    if gate.abs() <= widest {
        chart.line_at(gate, count, "#b91c1c");
    }
    for (row, (name, group)) in groups.into_iter().enumerate() {
        chart.name(row, name);
        chart.interval(row, 0.0, &group.difference, AFTER);
    }
    chart.end()
}

fn difficulty_plot(report: &Report) -> String {
    const COLORS: [&str; 3] = ["#b91c1c", "#b08900", "#15803d"];
    let difficulty = &report.comparison.difficulty;
    let all = report.comparison.pooled.tasks as f64;
    let title = "Tasks in %: never (red), sometimes (yellow), always solved (green)";
    let mut chart = Chart::new(title, 2, (0.0, 1.0));
    for (row, side) in Side::ALL.into_iter().enumerate() {
        chart.name(row, &report.arms.at(side).label);
        let mut from = 0.0;
        for (bucket, color) in Bucket::ALL.into_iter().zip(COLORS) {
            let tasks = difficulty.count(side, bucket);
            let to = from + tasks as f64 / all;
            chart.bar(row, (from, to), color, &tasks.to_string());
            from = to;
        }
    }
    chart.end()
}

#[cfg(test)]
pub(super) mod tests {
    use espalier_core::compare::{
        GateSettings, LossCurve, METHOD, Prices, REPORT_VERSION, ReportArm, ShownPair, Source,
        Tried, Used, compare, judge, pair,
    };
    use espalier_core::time::Timestamp;

    use super::super::talk::tests::talk;
    use super::*;

    /// Two tasks, of which the first arm solves one and the second both.
    pub fn report() -> Report {
        let tried = |arm: &str, task: &str, solved| Tried {
            job: format!("p/b/{arm}-{task}").parse().unwrap(),
            task: task.to_owned(),
            kind: "toy".to_owned(),
            sample: 0,
            solved: Some(solved),
            stop: "answered".to_owned(),
            reason: String::new(),
            used: Used::default(),
        };
        let before = vec![tried("a", "t", false), tried("a", "u", true)];
        let after = vec![tried("b", "t", true), tried("b", "u", true)];
        let comparison = compare(&pair(before, after), &Both::default()).unwrap();
        let arm = |label: &str| ReportArm {
            label: label.to_owned(),
            models: vec!["m".to_owned()],
            adapters: Vec::new(),
            adapter: None,
            batches: vec!["b".to_owned()],
            rollouts: 2,
            replayed: 0,
            prices: Some(Prices {
                prompt: 1.0,
                completion: 2.0,
            }),
        };
        Report {
            report_version: REPORT_VERSION,
            job: "p/b/compare".to_owned(),
            created_at_us: Timestamp(1),
            arms: Both {
                before: arm("base"),
                after: arm("shop@v2"),
            },
            gate: judge(&comparison, GateSettings::default()),
            comparison,
            method: METHOD.to_owned(),
            currency: "USD".to_owned(),
            shown: vec![ShownPair {
                task: "t".to_owned(),
                kind: "toy".to_owned(),
                sample: 0,
                solved: Both {
                    before: false,
                    after: true,
                },
                jobs: Both {
                    before: "b/a-t".to_owned(),
                    after: "b/b-t".to_owned(),
                },
            }],
            losses: vec![LossCurve {
                job: "t/train".to_owned(),
                train: vec![(1, 2.0), (2, 1.0)],
                eval: vec![(2, 1.5)],
            }],
            sources: vec![Source {
                path: "p/x".to_owned(),
                sha256: "ab".repeat(32),
                patches: 0,
            }],
            sources_sha256: "cd".repeat(32),
        }
    }

    fn page(said: &str) -> String {
        let mut report = report();
        report.arms.before.label = said.to_owned();
        report.shown[0].task = said.to_owned();
        let group = report.comparison.kinds["toy"].clone();
        report.comparison.kinds.insert(said.to_owned(), group);
        report.losses[0].job = said.to_owned();
        html(
            &report,
            &[Both {
                before: talk(said),
                after: talk(said),
            }],
        )
    }

    #[test]
    fn the_page_shows_plots_tables_and_traces() {
        let page = page("calm");
        for part in [
            "<title>calm and shop@v2</title>",
            "The gate does not pass",
            "<span class=\"failed\">failed</span> → <span class=\"solved\">solved</span>",
            "<div class=\"turn assistant\"",
            ">held-out<",
            "cost per solved task",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert_eq!(page.matches("<svg").count(), 4);
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }

    /// What a browser would fetch, run or follow stands in tags and attributes alone, and none comes from what was said.
    #[test]
    fn nothing_that_was_said_runs() {
        let plain = page("calm");
        let tags = |page: &str| page.matches('<').count();
        for said in [
            "<script>alert(1)</script>",
            "\"><img src=x onerror=alert(1)>",
            "</title></style></svg><iframe src=//evil>",
            "' onmouseover='alert(1)",
            "&lt;script&gt;<!--",
            "\u{202e}]]><svg/onload=alert(1)>",
        ] {
            let page = page(said);
            assert_eq!(tags(&page), tags(&plain), "{said}");
            for bad in ["<script", "<img", "<iframe", "<svg/", "<!--", "\u{202e}"] {
                assert!(!page.contains(bad), "{said}: {bad}");
            }
            assert_eq!(page.matches("' onmouseover").count(), 0, "{said}");
        }
        for bad in ["<script", "src=", "href=", "@import", "url("] {
            assert!(!plain.contains(bad), "{bad}");
        }
        assert!(plain.contains("default-src 'none'"));
    }
}
