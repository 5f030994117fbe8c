use espalier_core::chat::Message;

use super::*;
use crate::row::{Recorded, Split};

fn tokenizer() -> &'static Tokenizer {
    Tokenizer::shared().unwrap()
}

fn row(id: &str, trained: &[u32]) -> Row {
    let said = |text: &str| Message::assistant(text.into(), None, vec![]);
    let asked = |text: &str| Message::User {
        content: text.into(),
    };
    Row {
        id: id.into(),
        timestamp: String::new(),
        model: String::new(),
        messages: vec![
            asked("one?"),
            said("1"),
            said("2"),
            asked("and?"),
            said("3"),
        ],
        tools: vec![],
        truncated: false,
        original_id: None,
        truncation_point: None,
        task_id: Some("t".into()),
        task_kind: None,
        split: Split::Train,
        reward: None,
        trained_turns: trained.to_vec(),
        recorded: None,
    }
}

fn recorded(ids: &[u32], supervised: &[Range<u32>]) -> Row {
    Row {
        recorded: Some(Recorded {
            ids: ids.to_vec(),
            supervised: supervised.to_vec(),
        }),
        ..row("r", &[0])
    }
}

fn made(row: &Row, tokens_max: usize) -> Result<Sample, String> {
    sample(row, tokens_max, &mut Renderer::new(tokenizer())).map_err(|error| error.to_string())
}

fn trained_text(sample: &Sample) -> Vec<String> {
    let text = |span: &Range<u32>| {
        let ids = &sample.ids[span.start as usize..span.end as usize];
        tokenizer().decode(ids).unwrap()
    };
    sample.supervised.iter().map(text).collect()
}

#[test]
fn a_sample_ends_with_its_last_trained_token() {
    let sample = made(&row("a", &[0, 1]), 1000).unwrap();
    assert_eq!(trained_text(&sample), ["1<|im_end|>", "2<|im_end|>"]);
    assert_eq!(sample.supervised[1].end as usize, sample.ids.len());
    assert_eq!(sample.supervised_tokens(), 4);
    assert_eq!(sample.cut, None);
    assert_eq!(sample.origin, Origin::Rendered);
    assert_eq!(sample.task_id.as_deref(), Some("t"));
}

#[test]
fn too_long_a_row_loses_whole_turns() {
    let whole = made(&row("a", &[0, 2]), 1000).unwrap();
    let last = made(&row("a", &[0, 2]), whole.ids.len()).unwrap();
    assert_eq!(last, whole);
    let cut = made(&row("a", &[0, 2]), whole.ids.len() - 1).unwrap();
    assert_eq!(trained_text(&cut), ["1<|im_end|>"]);
    let (tokens, turns) = (whole.ids.len() + 1, 1);
    // The line break after the last turn belongs to the row.
    assert_eq!(cut.cut, Some(TurnsCut { tokens, turns }));
    let needed = cut.ids.len();
    let error =
        format!("sample `a` must have its first trained turn within 9 tokens, got {needed}");
    assert_eq!(made(&row("a", &[0, 2]), 9), Err(error));
}

#[test]
fn recorded_ids_are_taken_as_they_are() {
    let sample = made(&recorded(&[5, 6, 7, 8, 9], &[1..3, 3..4]), 1000).unwrap();
    assert_eq!(sample.ids, [5, 6, 7, 8]);
    assert_eq!(sample.supervised, [1..3, 3..4]);
    assert_eq!(sample.origin, Origin::Recorded);
}

#[test]
fn bad_rows_are_refused_by_name() {
    #[expect(clippy::reversed_empty_ranges, reason = "what is to be refused")]
    let backwards = 3..2;
    for (ids, supervised, error) in [
        (
            vec![1],
            vec![],
            "have a supervised token, got none in 1 tokens",
        ),
        (
            vec![1, 2],
            vec![0..1],
            "have ascending supervised ranges within 1..2, got 0..1",
        ),
        (
            vec![1, 2],
            vec![1..3],
            "have ascending supervised ranges within 1..2, got 1..3",
        ),
        (
            vec![1, 2, 3],
            vec![2..3, 1..2],
            "have ascending supervised ranges within 1..3, got 1..2",
        ),
        (
            vec![1, 2, 3],
            vec![backwards],
            "have ascending supervised ranges within 1..3, got 3..2",
        ),
        (
            vec![1, 151_669],
            vec![1..2],
            "have token ids below 151669, got 151669 at 1",
        ),
    ] {
        let expected = format!("sample `r` must {error}");
        assert_eq!(made(&recorded(&ids, &supervised), 99), Err(expected));
    }
    let error = "sample `a` must name trained turns below 3, got 3";
    assert_eq!(made(&row("a", &[3]), 99), Err(error.into()));
    let error = "sample `a` must have a supervised token, got none in 36 tokens";
    assert_eq!(made(&row("a", &[]), 99), Err(error.into()));
}

#[test]
fn many_rows_keep_their_order_over_threads() {
    let rows: Vec<Row> = (0..50)
        .map(|n| row(&n.to_string(), if n == 7 { &[] } else { &[0] }))
        .collect();
    let one = samples(&rows, 1000, 1, tokenizer());
    let four = samples(&rows, 1000, 4, tokenizer());
    for (n, (one, four)) in one.into_iter().zip(four).enumerate() {
        match (one, four) {
            (Ok(one), Ok(four)) => {
                assert_eq!(one, four);
                assert_eq!(one.id, n.to_string());
            }
            (Err(one), Err(four)) => {
                assert_eq!(one.to_string(), four.to_string());
                assert_eq!(n, 7);
            }
            different => panic!("{different:?}"),
        }
    }
    assert_eq!(samples(&[], 1000, 4, tokenizer()).len(), 0);
}
