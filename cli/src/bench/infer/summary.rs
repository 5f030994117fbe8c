//! What the visits come to: medians, bests, and ratios with their bounds.

use serde_json::{Value, json};

use super::super::figures::{Bound, Headline};
use super::super::percentile;
use super::check::Agreement;
use super::server::{Form, Kind};
use super::visit::{LONG_TOKENS, Visit};

/// From the process's start to its first token.
const START_MAX_S: f64 = 10.0;
/// Parameters of Qwen3-0.6B that a decode step reads, the LM head among them.
const PARAMETERS: f64 = 595_984_384.0;

/// What a figure is, and what it must be in times of llama.cpp's.
struct Figure {
    what: &'static str,
    unit: &'static str,
    of: fn(&Visit) -> f64,
    /// More is better.
    is_rate: bool,
    bound: Option<Bound>,
}

const FIGURES: [Figure; 7] = [
    Figure {
        what: "decode at batch 1",
        unit: "tokens/s",
        of: |visit| visit.decode_1_per_s,
        is_rate: true,
        bound: Some(Bound::AtLeast(0.8)),
    },
    Figure {
        what: "decode at batch 8",
        unit: "tokens/s",
        of: |visit| visit.decode_8_per_s,
        is_rate: true,
        bound: Some(Bound::AtLeast(0.8)),
    },
    Figure {
        what: "prefill",
        unit: "tokens/s",
        of: |visit| visit.prefill_per_s,
        is_rate: true,
        bound: Some(Bound::AtLeast(0.5)),
    },
    Figure {
        what: "first token",
        unit: "ms",
        of: |visit| visit.first_token_ms,
        is_rate: false,
        bound: Some(Bound::AtMost(2.0)),
    },
    Figure {
        what: "memory",
        unit: "MB",
        of: |visit| visit.pss_mb,
        is_rate: false,
        bound: Some(Bound::AtMost(1.2)),
    },
    Figure {
        what: "cached conversation",
        unit: "s",
        of: |visit| visit.turns_s,
        is_rate: false,
        bound: Some(Bound::AtMost(1.0)),
    },
    Figure {
        what: "start to first token",
        unit: "s",
        of: |visit| visit.start_s,
        is_rate: false,
        bound: None,
    },
];

/// All of one form of weights.
pub struct Visits {
    form: Form,
    ours: Vec<Visit>,
    theirs: Vec<Visit>,
    /// Bytes of memory that the cores read in a second, by round.
    pub reads_per_s: Vec<f64>,
    /// Of greedy answers, where both were asked.
    pub agreement: Option<Agreement>,
}

impl Visits {
    pub fn new(form: Form) -> Self {
        Self {
            form,
            ours: Vec::new(),
            theirs: Vec::new(),
            reads_per_s: Vec::new(),
            agreement: None,
        }
    }

    /// Those of one server.
    pub fn of(&mut self, kind: Kind) -> &mut Vec<Visit> {
        match kind {
            Kind::Espalier => &mut self.ours,
            Kind::Llama => &mut self.theirs,
        }
    }

    pub fn to_json(&self) -> Value {
        json!({
            "read_bytes_per_s": self.read_per_s(),
            "answers": self.agreement.as_ref().map(|a| {
                let [ours, theirs] = &a.instructions;
                json!({"ids": a.ids, "same": a.same, "instructions": { "espalier": ours, "llama.cpp": theirs }})
            }),
            "espalier": self.ours,
            "llama.cpp": self.theirs,
        })
    }

    pub fn headlines(&self) -> Vec<Headline> {
        let form = self.form.name();
        let mut headlines = Vec::new();
        for figure in &FIGURES {
            let ours = median(&self.ours, figure.of);
            let what = match figure.what {
                "prefill" => format!("{form}: prefill of {LONG_TOKENS} tokens"),
                what => format!("{form}: {what}"),
            };
            let mut own = Headline::new(what.clone(), ours, figure.unit);
            if figure.bound.is_none() {
                own = own.bound(Bound::AtMost(START_MAX_S));
            }
            headlines.push(own);
            if let (Some(bound), false) = (figure.bound, self.theirs.is_empty()) {
                let ratio = ours / median(&self.theirs, figure.of);
                let times = Headline::new(format!("{what}, in times of llama.cpp"), ratio, "");
                headlines.push(times.bound(bound));
            }
        }
        headlines.push(Headline::new(
            format!("{form}: decode at batch 1, of the memory's bandwidth"),
            best(&self.ours, &FIGURES[0]) * self.weight_bytes() / self.read_per_s(),
            "",
        ));
        headlines
    }

    /// Bytes of weights that a decode step reads.
    fn weight_bytes(&self) -> f64 {
        match self.form {
            Form::Bf16 => PARAMETERS * 2.0,
            // A scale of 16 bits for each 32 weights.
            Form::Q8 => PARAMETERS * (1.0 + 2.0 / 32.0),
        }
    }

    fn read_per_s(&self) -> f64 {
        self.reads_per_s.iter().copied().fold(0.0, f64::max)
    }
}

fn median(visits: &[Visit], of: fn(&Visit) -> f64) -> f64 {
    percentile(visits.iter().map(of).collect(), 0.5)
}

fn best(visits: &[Visit], figure: &Figure) -> f64 {
    percentile(
        visits.iter().map(figure.of).collect(),
        if figure.is_rate { 1.0 } else { 0.0 },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(rate: f64, time: f64) -> Visit {
        Visit {
            start_s: time,
            first_token_ms: time,
            decode_1_per_s: rate,
            decode_8_per_s: rate,
            prefill_per_s: rate,
            turns_s: time,
            pss_mb: time,
        }
    }

    #[test]
    fn medians_are_held_against_each_other() {
        let mut visits = Visits::new(Form::Bf16);
        for (rate, time) in [(10.0, 3.0), (8.0, 1.0), (30.0, 2.0)] {
            visits.of(Kind::Espalier).push(visit(rate, time));
        }
        visits.of(Kind::Llama).push(visit(20.0, 1.0));
        visits.reads_per_s = vec![1.0, PARAMETERS * 100.0];
        let headlines = visits.headlines();
        let of = |what: &str| headlines.iter().find(|one| one.what == what).unwrap();
        let decode = of("bf16: decode at batch 1, in times of llama.cpp");
        assert_eq!((decode.value, decode.holds), (0.5, Some(false)));
        let first = of("bf16: first token, in times of llama.cpp");
        assert_eq!((first.value, first.holds), (2.0, Some(true)));
        assert_eq!(of("bf16: start to first token").holds, Some(true));
        // 30 tokens a second at two bytes a parameter, of 100.
        let share = of("bf16: decode at batch 1, of the memory's bandwidth");
        assert!((share.value - 0.6).abs() < 1e-12);
    }

    #[test]
    fn without_llama_nothing_is_compared() {
        let mut visits = Visits::new(Form::Q8);
        visits.of(Kind::Espalier).push(visit(10.0, 3.0));
        visits.reads_per_s.push(1e9);
        let headlines = visits.headlines();
        assert_eq!(headlines.len(), 8);
        assert!(headlines.iter().all(|one| !one.what.contains("llama.cpp")));
    }
}
