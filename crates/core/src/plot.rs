//! The loss of a training over its steps as an SVG picture: the steps' own losses, their running mean, and the held-out samples'.

use std::fmt::Write;

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 450.0;
/// Room of the labels beside the frame.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 55.0;
/// Labels of an axis, about.
const TICKS: f64 = 6.0;
/// Most points of a line: more are not told apart at this width. Each is the mean of the steps that it stands for.
const POINTS_MAX: usize = 700;
/// Weight of what came before in the running mean.
const SMOOTHING: f64 = 0.9;

const RAW: &str = "#a9c4e4";
const TRAIN: &str = "#1f5fa8";
const EVAL: &str = "#c2410c";

/// A step and its loss.
pub type Point = (u64, f64);

/// The picture. `title` may be any text.
pub fn svg(title: &str, train: &[Point], eval: &[Point]) -> String {
    let train = thinned(train);
    let smooth = smoothed(&train);
    let eval: Vec<(f64, f64)> = eval.iter().map(|(x, y)| (*x as f64, *y)).collect();
    let frame = Frame::around(train.iter().chain(&eval));
    let mut out = String::new();
    // Writing into a `String` cannot fail.
    let _ = write!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/><text x="{LEFT}" y="24" font-size="15">{}</text>"##,
        escaped(title)
    );
    frame.axes(&mut out);
    frame.line(&mut out, &train, RAW, 1.0);
    frame.line(&mut out, &smooth, TRAIN, 2.0);
    frame.line(&mut out, &eval, EVAL, 2.0);
    for (x, y) in &eval {
        let (x, y) = frame.place(*x, *y);
        let _ = write!(
            out,
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{EVAL}"/>"#
        );
    }
    legend(&mut out, !eval.is_empty());
    out.push_str("</svg>\n");
    out
}

/// What the axes span.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    /// A frame around `points`, which may be none.
    fn around<'a>(points: impl Iterator<Item = &'a (f64, f64)> + Clone) -> Self {
        let span = |values: &mut dyn Iterator<Item = f64>| {
            let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
                (l.min(v), h.max(v))
            });
            match (low.is_finite() && high.is_finite(), high > low) {
                (false, _) => (0.0, 1.0),
                (true, false) => (low - 0.5, low + 0.5),
                (true, true) => (low, high),
            }
        };
        let x = span(&mut points.clone().map(|(x, _)| *x));
        let (low, high) = span(&mut points.map(|(_, y)| *y));
        let margin = (high - low) * 0.05;
        Self {
            x,
            y: (low - margin, high + margin),
        }
    }

    fn place(&self, x: f64, y: f64) -> (f64, f64) {
        let share = |value: f64, (low, high): (f64, f64)| (value - low) / (high - low);
        (
            LEFT + share(x, self.x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - share(y, self.y) * (HEIGHT - TOP - BOTTOM),
        )
    }

    fn axes(&self, out: &mut String) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for (at, text) in ticks(self.y) {
            let (_, y) = self.place(self.x.0, at);
            let _ = write!(
                out,
                r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#e5e5e5"/><text x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"##,
                LEFT - 8.0,
                y + 4.0
            );
        }
        for (at, text) in ticks(self.x) {
            let (x, _) = self.place(at, self.y.0);
            let _ = write!(
                out,
                r##"<path d="M{x:.1} {bottom}v5" stroke="#555"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{text}</text>"##,
                bottom + 19.0
            );
        }
        let _ = write!(
            out,
            r##"<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#555"/><text x="{:.1}" y="{:.1}" text-anchor="middle">step</text><text transform="translate(18 {:.1}) rotate(-90)" text-anchor="middle">loss</text>"##,
            f64::midpoint(LEFT, right),
            HEIGHT - 14.0,
            f64::midpoint(TOP, bottom)
        );
    }

    fn line(&self, out: &mut String, points: &[(f64, f64)], color: &str, width: f64) {
        if points.is_empty() {
            return;
        }
        let _ = write!(
            out,
            r#"<polyline fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round" points=""#
        );
        for (x, y) in points {
            let (x, y) = self.place(*x, *y);
            let _ = write!(out, "{x:.1},{y:.1} ");
        }
        out.push_str(r#""/>"#);
    }
}

/// Places within a span that are multiples of 1, 2 or 5 times a power of ten, with their labels.
fn ticks((low, high): (f64, f64)) -> Vec<(f64, String)> {
    let rough = (high - low) / TICKS;
    let power = 10_f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = steps.into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let decimals = (-step.log10().floor()).clamp(0.0, 12.0) as usize;
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    let tick = |n: i64| (n as f64 * step, format!("{:.decimals$}", n as f64 * step));
    (first..=last).map(tick).collect()
}

/// At most [`POINTS_MAX`] points, each the mean of as many that follow each other.
fn thinned(points: &[Point]) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS_MAX).max(1);
    let mean = |some: &[Point]| {
        let count = some.len() as f64;
        let (x, y) = some
            .iter()
            .fold((0.0, 0.0), |(x, y), p| (x + p.0 as f64, y + p.1));
        (x / count, y / count)
    };
    points.chunks(each).map(mean).collect()
}

fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut mean = None;
    let next = |(x, y): &(f64, f64)| {
        let before = mean.unwrap_or(*y);
        let now = SMOOTHING * before + (1.0 - SMOOTHING) * y;
        mean = Some(now);
        (*x, now)
    };
    points.iter().map(next).collect()
}

fn legend(out: &mut String, has_eval: bool) {
    let entries = [
        (TRAIN, "training, smoothed"),
        (RAW, "training"),
        (EVAL, "held-out"),
    ];
    let count = if has_eval { 3 } else { 2 };
    for (n, (color, text)) in entries.into_iter().take(count).enumerate() {
        let x = WIDTH - RIGHT - 150.0;
        let y = TOP + 10.0 + 18.0 * n as f64;
        let _ = write!(
            out,
            r#"<path d="M{x} {y}h24" stroke="{color}" stroke-width="3"/><text x="{}" y="{}">{text}</text>"#,
            x + 30.0,
            y + 4.0
        );
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The points of the line of this colour.
    fn line(svg: &str, color: &str) -> Vec<(f64, f64)> {
        let of_color = format!(r#"stroke="{color}""#);
        let from = svg.split("<polyline").find(|part| part.contains(&of_color));
        let points = from.unwrap().split("points=\"").nth(1).unwrap();
        let points = points.split('"').next().unwrap();
        let point = |text: &str| {
            let (x, y) = text.split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        };
        points.split_whitespace().map(point).collect()
    }

    #[test]
    fn lines_go_where_the_axes_say() {
        let train: Vec<Point> = (1..=100).map(|n| (n, 4.0 - n as f64 / 50.0)).collect();
        let svg = svg("a <b> & c", &train, &[(50, 3.5), (100, 2.5)]);
        assert!(svg.contains("a &lt;b&gt; &amp; c") && svg.ends_with("</svg>\n"));
        let raw = line(&svg, RAW);
        assert_eq!(raw.len(), 100);
        assert_eq!((raw[0].0, raw[99].0), (LEFT, WIDTH - RIGHT));
        assert!(raw[0].1 < raw[99].1, "a loss that falls goes down");
        assert!(raw.iter().all(|(_, y)| (TOP..=HEIGHT - BOTTOM).contains(y)));
        let eval = line(&svg, EVAL);
        assert_eq!(eval.len(), 2);
        assert!(line(&svg, TRAIN)[99].1 < raw[99].1, "the mean lags behind");
        for label in [">20<", ">100<", ">2.0<", ">3.5<", ">held-out<"] {
            assert!(svg.contains(label), "{label}");
        }
    }

    #[test]
    fn long_trainings_are_thinned_and_short_ones_drawn() {
        let long: Vec<Point> = (0..100_000).map(|n| (n, 1.0)).collect();
        assert_eq!(
            line(&svg("t", &long, &[]), RAW).len(),
            100_000_usize.div_ceil(143)
        );
        for few in [&[][..], &[(1, 2.0)], &[(1, 2.0), (2, 2.0)]] {
            let drawn = svg("t", few, &[]);
            assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
        }
    }

    #[test]
    fn ticks_are_round_numbers_within_the_span() {
        let labels = |span| {
            ticks(span)
                .into_iter()
                .map(|(_, text)| text)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            labels((0.0, 1.0)),
            ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
        );
        assert_eq!(labels((1.0, 1000.0)), ["200", "400", "600", "800", "1000"]);
        assert_eq!(labels((2.31, 2.34))[0], "2.310");
    }
}
