use std::sync::Arc;

use super::super::super::{BlockId, Penalties, Seen};
use super::*;

const BOUNDS: Bounds = Bounds {
    rows: 4,
    tokens: 200,
    positions: 512,
    kv_blocks: 100,
    mask_words: 3,
};

fn row(seq: u64, start: u32, tokens: usize, adapter: Option<u32>) -> Row {
    let blocks = (start as usize + tokens).div_ceil(16);
    Row {
        seq: SeqId(seq),
        input: Input::Ids((0..tokens as u32).map(|i| seq as u32 * 1000 + i).collect()),
        start,
        blocks: (0..blocks as u32)
            .map(|i| BlockId(seq as u32 * 10 + i))
            .collect(),
        adapter: adapter.map(AdapterSlot),
        sample: Some(Sampling::default()),
    }
}

struct Written {
    words: Vec<u32>,
    tail: Vec<u32>,
    layout: Layout,
}

impl Written {
    fn list(&self, start: usize, len: usize) -> &[u32] {
        &self.words[start..start + len]
    }
}

fn write(step: &Step, shape: impl Fn(&Sorted<'_>) -> Shape) -> (Written, Vec<Due>) {
    let sorted = Sorted::new(step, &BOUNDS).unwrap();
    let layout = Layout::new(shape(&sorted));
    let mut words = vec![12345; layout.tail];
    let drawn = HashMap::from([(SeqId(7), 2)]);
    let adapters = HashMap::from([(AdapterSlot(5), 1), (AdapterSlot(9), 0)]);
    let tail = sorted
        .write(&mut words, &layout, &BOUNDS, &drawn, &adapters)
        .unwrap();
    let written = Written {
        words,
        tail,
        layout,
    };
    (written, sorted.due)
}

#[test]
fn answers_come_first_by_adapter_and_prompts_in_tiles() {
    let mut sampled = row(7, 20, 1, Some(9));
    sampled.input = Input::Sampled;
    let mut chunk = row(2, 3, 70, Some(5));
    chunk.sample = None;
    let step = Step {
        rows: vec![chunk, sampled, row(3, 0, 1, None), row(4, 16, 2, None)],
    };
    let (written, due) = write(&step, |sorted| sorted.shape(80));
    let layout = &written.layout;
    assert_eq!(
        layout.shape,
        Shape {
            tokens: 80,
            rows: 4,
            decodes: 2,
            tiles: 3,
            draws: 3
        }
    );
    // Row 3 (no adapter), 7 (slot 9), then 4 (none) and 2 (slot 5).
    let ids = written.list(layout.ids, 80);
    assert_eq!(ids[..5], [3000, FROM_DRAWN | 2, 4000, 4001, 2000]);
    assert_eq!((ids[73], ids[74]), (2069, 0));
    let positions = written.list(layout.positions, 80);
    assert_eq!(positions[..5], [0, 20, 16, 17, 3]);
    assert_eq!(positions[73], 72);
    let rows = written.list(layout.token_rows, 80);
    assert_eq!(
        (&rows[..5], rows[73], rows[74]),
        (&[0, 1, 2, 2, 3][..], 3, NONE)
    );
    let slots = written.list(layout.slots, 80);
    assert_eq!(
        (&slots[..5], slots[74]),
        (&[NONE, 0, NONE, NONE, 1][..], NONE)
    );
    assert_eq!(written.list(layout.lengths, 2), [1, 21]);
    assert_eq!(
        written.list(layout.tiles, 12),
        [2, 2, 2, 16, 3, 4, 64, 3, 3, 68, 6, 67]
    );
    // Logits of the last token of each row that draws, in the device's order; results in the step's.
    assert_eq!(written.list(layout.wanted, 3), [0, 1, 3]);
    let places: Vec<(u64, usize)> = due.iter().map(|due| (due.seq.0, due.place)).collect();
    assert_eq!(places, [(7, 1), (3, 0), (4, 2)]);
    // Blocks lie one behind the other.
    let starts = written.list(layout.starts, 5);
    let blocks = |r: usize| &written.tail[starts[r] as usize..starts[r + 1] as usize];
    assert_eq!(blocks(0), [30]);
    assert_eq!(blocks(1), [70, 71]);
    assert_eq!(blocks(2), [40, 41]);
    assert_eq!(blocks(3), [20, 21, 22, 23, 24]);
}

#[test]
fn a_decode_step_is_filled_up_with_rows_that_do_nothing() {
    let step = Step {
        rows: vec![row(1, 0, 1, None)],
    };
    let (written, due) = write(&step, |_| Shape::decode(4));
    let layout = &written.layout;
    assert_eq!(due.len(), 1);
    assert_eq!(written.list(layout.token_rows, 4), [0, NONE, NONE, NONE]);
    assert_eq!(written.list(layout.lengths, 4), [1, 0, 0, 0]);
    assert_eq!(written.list(layout.wanted, 4), [0, NONE, NONE, NONE]);
    assert_eq!(written.list(layout.starts, 5), [0, 1, 1, 1, 1]);
    let how = |draw: usize| written.list(layout.how + draw * SampleRow::WORDS, SampleRow::WORDS);
    assert_eq!(how(1), SampleRow::IDLE.words());
    let greedy = SampleRow {
        feed: 0,
        ..SampleRow::GREEDY
    };
    assert_eq!(how(0), greedy.words());
}

#[test]
fn masks_pairs_and_blocks_share_the_tail() {
    let mut step = Step {
        rows: vec![row(1, 0, 1, None), row(2, 0, 1, None), row(3, 0, 1, None)],
    };
    step.rows[0].sample = Some(Sampling {
        allowed: Some(Arc::new([1, 2])),
        bias: Some(Arc::new([(9, 1.5), (4, -2.0), (9, 0.25)])),
        seed: (3 << 32) | 7,
        step: 11,
        ..Sampling::default()
    });
    let seen = [(8, 0), (5, 2)].map(|(id, in_answer)| Seen { id, in_answer });
    step.rows[2].sample = Some(Sampling {
        // Longer than the vocabulary: what is beyond it is left out.
        allowed: Some(Arc::new([4, 5, 6, 7])),
        penalties: Some(Penalties {
            presence: 0.5,
            frequency: 0.25,
            repetition: 1.5,
            seen: seen.into_iter().collect(),
        }),
        logprobs: Some(200),
        temperature: 0.5,
        ..Sampling::default()
    });
    let (written, due) = write(&step, |sorted| sorted.shape(16));
    let how = |draw: usize| {
        let at = written.layout.how + draw * SampleRow::WORDS;
        &written.words[at..at + SampleRow::WORDS]
    };
    let none = SampleRow {
        seen_from: 3,
        seen_to: 3,
        ..SampleRow::GREEDY
    };
    assert_eq!(written.tail[..6], [1, 2, 0, 4, 5, 6]);
    assert_eq!(
        how(0),
        SampleRow {
            mask: 0,
            bias_from: 3,
            bias_to: 5,
            feed: 0,
            seed_low: 7,
            seed_high: 3,
            step: 11,
            ..none
        }
        .words()
    );
    let pair = |i: usize| (written.tail[2 * i], written.tail[2 * i + 1]);
    assert_eq!(pair(3), (4, (-2.0_f32).to_bits()));
    assert_eq!(pair(4), (9, 1.75_f32.to_bits()));
    assert_eq!(
        how(2),
        SampleRow {
            temperature: 0.5,
            top_count: TOP_MAX as u32,
            presence: 0.5,
            frequency: 0.25,
            repetition: 1.5,
            seen_from: 5,
            seen_to: 7,
            mask: 1,
            bias_from: 7,
            bias_to: 7,
            feed: 2,
            ..SampleRow::GREEDY
        }
        .words()
    );
    assert_eq!((pair(5), pair(6)), ((5, 2), (8, 0)));
    assert_eq!(due[2].top, TOP_MAX);
    let starts = written.list(written.layout.starts, 4);
    assert_eq!(written.tail[starts[0] as usize], 10);
    assert_eq!(written.tail[starts[2] as usize], 30);
}

#[test]
fn what_is_no_step_is_refused() {
    let refused = |rows: Vec<Row>| {
        let step = Step { rows };
        let sorted = Sorted::new(&step, &BOUNDS).map_err(|error| error.to_string());
        match sorted {
            Err(error) => error,
            Ok(sorted) => {
                let layout = Layout::new(sorted.shape(sorted.tokens));
                let mut words = vec![0; layout.tail];
                let none = HashMap::new();
                sorted
                    .write(&mut words, &layout, &BOUNDS, &HashMap::new(), &none)
                    .unwrap_err()
                    .to_string()
            }
        }
    };
    assert!(refused(Vec::new()).contains("0 rows and 0 tokens"));
    let five = (0..5).map(|i| row(i, 0, 1, None)).collect();
    assert!(refused(five).contains("5 rows and 5 tokens is not within 1 to 4 and 200"));
    assert!(refused(vec![row(1, 0, 201, None)]).contains("201 tokens"));
    assert!(refused(vec![row(1, 500, 13, None)]).contains("ends at position 513 of 512"));
    assert!(refused(vec![row(9, 140, 4, None), row(90, 0, 1, None)]).contains("BlockId(900)"));
    assert!(
        refused(vec![row(1, 0, 1, Some(4))]).contains("no adapter is loaded as AdapterSlot(4)")
    );
    let mut sampled = row(1, 5, 1, None);
    sampled.input = Input::Sampled;
    assert!(refused(vec![sampled]).contains("the step before drew nothing for it"));
    let mut empty = row(1, 5, 1, None);
    empty.input = Input::Ids(Vec::new());
    assert!(refused(vec![empty]).contains("it has no tokens"));
    let mut short = row(1, 30, 10, None);
    short.blocks.pop();
    assert!(refused(vec![short]).contains("2 blocks do not hold 40 positions"));
}

#[test]
fn results_lie_apart() {
    let results = Results::new(65);
    assert_eq!((results.logprobs, results.top_ids), (128, 256));
    assert_eq!(results.top_logprobs - results.top_ids, 1344);
    assert_eq!(
        (results.words(false), results.words(true)),
        (256, 256 + 2 * 1344)
    );
    assert_eq!(Results::new(0).words(true), 0);
}
