//! Rows that are read, and rows that are refused.

use super::*;

const RULES: Rules = Rules {
    vocabulary: 100,
    max_length: 6,
};

fn read(text: &str, piece: usize) -> Result<Samples, DataError> {
    let mut lines = RowLines::new("p/uploads/rows.jsonl", RULES);
    for piece in text.as_bytes().chunks(piece) {
        lines.push(piece)?;
    }
    lines.finish()
}

#[test]
fn rows_are_read_whole_in_whatever_pieces_they_come() {
    let text = "{\"id\":\"a\",\"ids\":[1,2,3],\"supervised\":[[1,3]],\"kind\":\"x\"}\n\n\
        {\"id\":\"b\",\"ids\":[4,5,6,7],\"supervised\":[[0,2],[3,4]]}";
    for piece in [1, 7, 1000] {
        let samples = read(text, piece).unwrap();
        assert_eq!((samples.len(), samples.tokens(), samples.cut()), (2, 7, 0));
        assert_eq!((samples.name(1), samples.lengths()), ("b", vec![3, 4]));
        let packed = samples.pack(&[1, 0]);
        let documents = packed.documents();
        assert_eq!(documents.ids, [4, 5, 6, 7, 1, 2, 3]);
        assert_eq!(documents.ends, [4, 7]);
        let supervised = [false, true, false, true, false, true, true];
        assert_eq!(documents.supervised, supervised);
    }
}

#[test]
fn a_sample_that_is_too_long_ends_with_its_last_whole_turn() {
    let long = r#"{"id":"a","ids":[1,2,3,4,5,6,7,8],"supervised":[[1,2],[3,5],[6,8]]}"#;
    let samples = read(long, 1000).unwrap();
    assert_eq!((samples.lengths(), samples.cut()), (vec![5], 1));
    assert_eq!(
        samples.pack(&[0]).documents().supervised,
        [false, true, false, true, true]
    );
    let hopeless = r#"{"id":"a","ids":[1,2,3,4,5,6,7,8],"supervised":[[1,8]]}"#;
    let error = read(hopeless, 1000).unwrap_err().to_string();
    assert_eq!(
        error,
        "sample `a` (line 1 of `p/uploads/rows.jsonl`): `supervised` must have a turn that ends within `max_length`, \
         which is 6, got 8 tokens"
    );
}

#[test]
fn what_breaks_a_rule_is_named_by_sample_field_value_and_rule() {
    for (line, said) in [
        (
            "{",
            "line 2 of `p/uploads/rows.jsonl` must be a row of tokens: EOF",
        ),
        (r#"{"id":"a","ids":[1]}"#, "missing field `supervised`"),
        (r#"{"id":"a","ids":[-1],"supervised":[]}"#, "invalid value"),
        (
            r#"{"id":"","ids":[1,2],"supervised":[[1,2]]}"#,
            "`id` must be a name of 1 to 512 bytes, got 0 bytes",
        ),
        (
            r#"{"id":"a","ids":[1,100],"supervised":[[1,2]]}"#,
            "`ids` must be below the model's vocabulary, 100, got 100 at 1",
        ),
        (
            r#"{"id":"a","ids":[1,2],"supervised":[]}"#,
            "sample `a` (line 2 of `p/uploads/rows.jsonl`): `supervised` must have at least one token after the first, got []",
        ),
        (
            r#"{"id":"a","ids":[1,2],"supervised":[[0,1]]}"#,
            "got [[0, 1]]",
        ),
        (r#"{"id":"a","ids":[],"supervised":[]}"#, "got []"),
        (
            r#"{"id":"a","ids":[1,2],"supervised":[[1,3]]}"#,
            "`supervised` must be ascending ranges within 2 tokens, got 1..3",
        ),
        (
            r#"{"id":"a","ids":[1,2,3],"supervised":[[1,3],[2,3]]}"#,
            "got 2..3",
        ),
        (
            r#"{"id":"a","ids":[1,2,3],"supervised":[[2,2]]}"#,
            "got 2..2",
        ),
    ] {
        let good = r#"{"id":"g","ids":[1,2],"supervised":[[1,2]]}"#;
        let error = read(&format!("{good}\n{line}\n{good}"), 1000).unwrap_err();
        assert!(error.to_string().contains(said), "{line}: {error}");
    }
    for empty in ["", "\n \n"] {
        let error = read(empty, 1000).unwrap_err().to_string();
        assert_eq!(
            error,
            "`p/uploads/rows.jsonl` must have at least one sample, and it is empty"
        );
    }
}

#[test]
fn a_change_of_any_row_changes_the_digest() {
    let digest = |row: &str| read(row, 1000).unwrap().sha256();
    let row = r#"{"id":"a","ids":[1,2,3],"supervised":[[1,3]]}"#;
    assert_eq!(digest(row), digest(&format!("\n{row}\n")));
    for (from, to) in [
        ("\"a\"", "\"b\""),
        ("3]", "4]"),
        ("[1,3]", "[2,3]"),
        ("3]]", "2]]"),
    ] {
        let other = row.replacen(from, to, 1);
        assert_ne!(digest(row), digest(&other), "{other}");
    }
}
