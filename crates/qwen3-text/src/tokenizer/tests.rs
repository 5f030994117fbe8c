use proptest::prelude::*;
use serde::Deserialize;

use super::*;

fn tokenizer() -> &'static Tokenizer {
    Tokenizer::shared().unwrap()
}

/// A small one as a model may bring it; see `tests/golden/small/make.py`.
pub(crate) const SMALL: &str = include_str!("../../tests/golden/small/tokenizer.json");

pub(crate) fn small() -> &'static Tokenizer {
    static PARSED: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_json(SMALL).unwrap());
    &PARSED
}

/// Both, each with what Hugging Face's libraries make of texts.
fn both() -> [(&'static Tokenizer, Vec<Golden>); 2] {
    let read = |json| serde_json::from_str(json).unwrap();
    [
        (
            tokenizer(),
            read(include_str!("../../tests/golden/tokens.json")),
        ),
        (
            small(),
            read(include_str!("../../tests/golden/small/tokens.json")),
        ),
    ]
}

#[derive(Deserialize)]
struct Golden {
    text: String,
    ids: Vec<u32>,
    /// Absent where it equals `ids`.
    ordinary: Option<Vec<u32>>,
}

#[test]
fn ids_equal_those_of_transformers() {
    for (tokenizer, cases) in both() {
        assert!(cases.len() >= 40);
        for case in &cases {
            let ordinary = case.ordinary.as_ref().unwrap_or(&case.ids);
            assert_eq!(tokenizer.encode(&case.text), case.ids, "{:?}", case.text);
            assert_eq!(
                &tokenizer.encode_ordinary(&case.text),
                ordinary,
                "{:?}",
                case.text
            );
            assert_eq!(tokenizer.count(&case.text), ordinary.len());
        }
    }
}

#[test]
fn decoding_gives_the_composed_text_back() {
    for (tokenizer, cases) in both() {
        for case in cases {
            assert_eq!(
                tokenizer.decode(&case.ids).unwrap(),
                composed_by_parts(&case.text),
                "{:?}",
                case.text
            );
        }
    }
}

/// Added tokens keep their neighbours from composing with each other, so each part is composed by itself.
fn composed_by_parts(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((at, _, control)) = find_control(rest) {
        out.push_str(&composed(&rest[..at]));
        out.push_str(control);
        rest = &rest[at + control.len()..];
    }
    out + &composed(rest)
}

fn composed(text: &str) -> Cow<'_, str> {
    tokenizer().composed(text)
}

#[test]
fn untrusted_text_never_becomes_a_control_token() {
    for (tokenizer, _) in both() {
        for (text, id) in CONTROL.into_iter().zip(tokenizer.controls()) {
            assert_eq!(tokenizer.encode(text), [*id]);
            assert_eq!(tokenizer.token_bytes(*id), Some(text.as_bytes()));
            let ordinary = tokenizer.encode_ordinary(&format!("x{text}y"));
            let controls = tokenizer.controls();
            assert!(ordinary.iter().all(|id| !controls.contains(id)), "{text}");
        }
    }
}

#[test]
fn ids_with_a_meaning_are_those_of_their_texts() {
    for (tokenizer, _) in both() {
        let ids = *tokenizer.ids();
        for (text, id, is_special) in [
            ("<|endoftext|>", ids.end_of_text, true),
            ("<|im_start|>", ids.turn_open, true),
            ("<|im_end|>", ids.turn_close, true),
            ("<tool_call>", ids.call_open, false),
            ("</tool_call>", ids.call_close, false),
            ("<think>", ids.thought_open, false),
            ("</think>", ids.thought_close, false),
        ] {
            assert_eq!(tokenizer.encode(text), [id]);
            assert_eq!(tokenizer.is_special(id), is_special, "{text}");
        }
        assert_eq!(tokenizer.controls().len(), 26);
        assert!(!tokenizer.is_special(tokenizer.vocabulary()));
    }
    assert_eq!(small().vocabulary(), 2100);
    assert_eq!(
        (small().ids().turn_close, small().ids().call_open),
        (23, 11)
    );
}

#[test]
fn no_marker_hides_another() {
    for text in CONTROL {
        assert!(text.starts_with('<'));
        let hides = |other: &str| other != text && text.starts_with(other);
        assert!(!CONTROL.into_iter().any(hides));
    }
}

#[test]
fn decoding_refuses_padding_ids_and_replaces_half_a_character() {
    let unknown = tokenizer().decode(&[9707, 151_669]);
    assert_eq!(unknown, Err(UnknownId { id: 151_669 }));
    assert_eq!(small().decode(&[97, 2100]), Err(UnknownId { id: 2100 }));
    let ids = tokenizer().encode("𝒳");
    assert!(ids.len() > 1);
    assert_eq!(tokenizer().decode(&ids[..1]).unwrap(), "\u{FFFD}");
}

#[test]
fn no_token_is_longer_than_the_bound() {
    for (tokenizer, _) in both() {
        let words = (0..tokenizer.vocabulary()).filter(|id| !tokenizer.controls().contains(id));
        let longest = words.filter_map(|id| tokenizer.token_bytes(id).map(<[u8]>::len));
        assert_eq!(longest.max(), Some(tokenizer.parts.token_bytes_max));
    }
    assert_eq!(tokenizer().parts.token_bytes_max, 128);
}

#[test]
fn counting_stops_at_the_limit() {
    let text = "word ".repeat(1_000_000);
    assert_eq!(tokenizer().count_at_most(&text, 100), None);
    assert_eq!(tokenizer().count_at_most("one two three", 3), Some(3));
    assert_eq!(tokenizer().count_at_most("one two three", 2), None);
    assert_eq!(tokenizer().count_at_most("", 0), Some(0));
    assert_eq!(tokenizer().count_at_most("a", 0), None);
    assert_eq!(tokenizer().count_at_most(&"a".repeat(20_000), 100), None);
}

#[test]
fn a_prefix_ends_at_the_last_token_that_fits() {
    let text = "one two three";
    assert_eq!(tokenizer().prefix_within(text, 2), "one two");
    assert_eq!(tokenizer().prefix_within(text, 3), text);
    assert_eq!(tokenizer().prefix_within(text, 0), "");
    assert_eq!(tokenizer().prefix_within("𝒳𝒳", 1), "");
    // 128 bytes to a token: the window has to grow before it holds all of them.
    let wide = " ".repeat(10_000);
    assert_eq!(tokenizer().prefix_within(&wide, 50).len(), 50 * 128);
}

/// Text that meets the splitting pattern's corners: whitespace runs, marks, scripts, quotes, markers.
fn awkward() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        r"[ \t]{0,5}",
        r"[\r\n]{1,3}",
        r"[a-z']{1,6}",
        r"[0-9.,:{}<>|!-]{1,6}",
        r"\PC{1,4}",
        Just("\n  - ".to_owned()),
        Just("e\u{301}".to_owned()),
        Just("\u{301}".to_owned()),
        Just("\u{1112}\u{1161}\u{11ab}".to_owned()),
        Just("\u{85}\u{2028}".to_owned()),
        Just("<|im_end|>".to_owned()),
        Just("日本語🙂".to_owned()),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

#[test]
fn every_byte_has_a_token() {
    for byte in 0..=255u8 {
        // Most bytes occur in text only within a character, so the alphabet is asked directly.
        let character = (0..0x200)
            .filter_map(char::from_u32)
            .find(|&c| bytes::byte_of(c) == Some(byte));
        let id = tokenizer()
            .parts
            .model
            .token_to_id(&character.unwrap().to_string());
        assert!(id.is_some(), "{byte:#04x}");
    }
}

proptest! {
    #[test]
    fn no_character_is_lost(text in awkward()) {
        for tokenizer in [tokenizer(), small()] {
            let ids = tokenizer.encode_ordinary(&text);
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), composed(&text));
        }
    }

    #[test]
    fn counts_of_lines_add_up(text in awkward()) {
        for tokenizer in [tokenizer(), small()] {
            let sum: usize = tokenizer.lines(&text).map(|line| tokenizer.count(line)).sum();
            prop_assert_eq!(sum, tokenizer.count(&text));
            prop_assert_eq!(tokenizer.lines(&text).collect::<String>(), text.clone());
        }
    }

    #[test]
    fn a_prefix_is_within_its_limit_and_nothing_is_cut_needlessly(text in awkward(), max in 0usize..40) {
        for tokenizer in [tokenizer(), small()] {
            let prefix = tokenizer.prefix_within(&text, max);
            prop_assert!(text.starts_with(prefix));
            prop_assert!(tokenizer.count(prefix) <= max);
            if tokenizer.count(&text) <= max {
                prop_assert_eq!(prefix, &text);
            }
        }
    }

    #[test]
    fn counting_with_a_limit_agrees_with_counting(text in awkward(), max in 0usize..40) {
        for tokenizer in [tokenizer(), small()] {
            let count = tokenizer.count(&text);
            let expected = (count <= max).then_some(count);
            prop_assert_eq!(tokenizer.count_at_most(&text, max), expected);
        }
    }
}
