use espalier_qwen3_text::Tokenizer;
use serde_json::Value;

use super::*;

const END: u32 = 256;
const CALL: (u32, u32) = (257, 258);
const THOUGHT: (u32, u32) = (259, 260);

/// Every byte is an id, and so are two words.
fn guides() -> Guides {
    let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    for word in [
        "<|im_end|>",
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "{\"a\": ",
        "true",
    ] {
        words.push(word.as_bytes().to_vec());
    }
    let vocabulary = Vocabulary {
        words,
        control: (256..=260).collect(),
        end: END,
        call: CALL,
        thought: THOUGHT,
    };
    Guides::new(vocabulary).unwrap()
}

fn allows(mask: &[u32], id: u32) -> bool {
    mask.get(id as usize / 32)
        .is_some_and(|word| word >> (id % 32) & 1 == 1)
}

/// Pushes `text`, where each id must be allowed; control ids stand as `⟨id⟩`.
fn accept(constraint: &mut dyn Constraint, ids: &[u32]) -> Result<(), usize> {
    for (i, &id) in ids.iter().enumerate() {
        if !allows(&constraint.allowed().unwrap(), id) {
            return Err(i);
        }
        constraint.push(id).unwrap();
    }
    Ok(())
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn json_grammar(schema: Value) -> Grammar {
    Grammar::Json { schema }
}

fn calls(several: bool) -> Grammar {
    let call = |name: &str, arguments: Value| CallGrammar {
        name: name.to_owned(),
        arguments,
    };
    let reference = json!({"properties": {"u": {"$ref": "#/$defs/url"}}, "required": ["u"], "$defs": {"url": {"type": "string", "maxLength": 4}}});
    let calls = vec![
        call("open", reference),
        call("say \"hi\"", json!({"type": "object"})),
    ];
    Grammar::Calls { calls, several }
}

#[test]
fn json_follows_its_schema_and_then_the_answer_ends() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
        "additionalProperties": false});
    let guides = guides();
    let mut constraint = guides
        .constrain(&json_grammar(schema.clone()), Thoughts::Over)
        .unwrap();
    assert_eq!(
        accept(&mut *constraint, &bytes("\n\n{\"a\": true}")),
        Ok(())
    );
    let mask = constraint.allowed().unwrap();
    assert!(allows(&mask, END) && !allows(&mask, u32::from(b'x')));
    let mut constraint = guides
        .constrain(&json_grammar(schema.clone()), Thoughts::Over)
        .unwrap();
    assert_eq!(accept(&mut *constraint, &bytes("{\"b")), Err(2));
    let mut constraint = guides
        .constrain(&json_grammar(schema), Thoughts::Over)
        .unwrap();
    assert_eq!(
        accept(&mut *constraint, &[261, 262, u32::from(b'}'), END]),
        Ok(())
    );
}

#[test]
fn blanks_come_to_an_end() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
        "x-guidance": {"lenient": true, "whitespace_pattern": " +"}});
    let guides = guides();
    let mut constraint = guides
        .constrain(&json_grammar(schema), Thoughts::Over)
        .unwrap();
    accept(&mut *constraint, &bytes("{")).unwrap();
    let blanks = vec![u32::from(b' '); 100];
    assert_eq!(accept(&mut *constraint, &blanks), Err(40));
}

#[test]
fn control_ids_never_stand_in_a_string() {
    let guides = guides();
    let mut constraint = guides
        .constrain(&json_grammar(json!({"type": "string"})), Thoughts::Over)
        .unwrap();
    accept(&mut *constraint, &bytes("\"<")).unwrap();
    let mask = constraint.allowed().unwrap();
    for id in 256..=260 {
        assert!(!allows(&mask, id), "{id}");
    }
    assert!(!allows(&mask, 1_000_000));
}

#[test]
fn calls_name_a_tool_and_follow_its_schema() {
    let guides = guides();
    let call = |text: &str| [&[CALL.0][..], &bytes(text), &[CALL.1]].concat();
    let good = call("\n{\"name\": \"open\", \"arguments\": {\"u\": \"a:b\"}}\n");
    let two = [
        good.clone(),
        bytes("\n"),
        call("\n{\"name\": \"say \\\"hi\\\"\", \"arguments\": {}}\n"),
    ]
    .concat();
    for (grammar, ids, fits) in [
        (calls(true), &good, true),
        (calls(true), &two, true),
        (calls(false), &good, true),
        (calls(false), &two, false),
        (calls(true), &call("\n{\"name\": \"close\""), false),
        (
            calls(true),
            &call("\n{\"name\": \"open\", \"arguments\": {\"u\": \"a:b:c\"}}\n"),
            false,
        ),
        (
            calls(true),
            &call("\n{\"name\": \"open\", \"arguments\": {\"u\":\"a\", \"v\": 1}}\n"),
            false,
        ),
        (
            calls(true),
            &call("\n{\"name\": \"open\", \"arguments\": {     \"u\": \"a\"}}\n"),
            false,
        ),
        (calls(true), &bytes("hello"), false),
    ] {
        let mut constraint = guides.constrain(&grammar, Thoughts::Over).unwrap();
        assert_eq!(accept(&mut *constraint, ids).is_ok(), fits, "{ids:?}");
    }
}

#[test]
fn thoughts_are_free_and_cannot_end_the_answer() {
    let guides = guides();
    let schema = json_grammar(json!({"type": "boolean"}));
    let mut constraint = guides.constrain(&schema, Thoughts::Possible).unwrap();
    let thought = [
        &[THOUGHT.0][..],
        &bytes("what now"),
        &[THOUGHT.1],
        &bytes("\n\ntrue"),
        &[END],
    ]
    .concat();
    assert_eq!(accept(&mut *constraint, &thought), Ok(()));
    let mut constraint = guides.constrain(&schema, Thoughts::Possible).unwrap();
    assert_eq!(accept(&mut *constraint, &bytes("true")), Ok(()));
    let mut constraint = guides.constrain(&schema, Thoughts::Open).unwrap();
    assert_eq!(accept(&mut *constraint, &bytes("x")), Ok(()));
    let mask = constraint.allowed().unwrap();
    assert!(!allows(&mask, END) && !allows(&mask, CALL.0) && allows(&mask, THOUGHT.1));
    let mut constraint = guides.constrain(&schema, Thoughts::Over).unwrap();
    assert_eq!(accept(&mut *constraint, &[THOUGHT.0]), Err(0));
}

#[test]
fn one_or_the_other() {
    let guides = guides();
    let Grammar::Calls { calls, several } = calls(true) else {
        unreachable!()
    };
    let grammar = Grammar::JsonOrCalls {
        schema: json!({"type": "boolean"}),
        calls,
        several,
    };
    let constraint = || guides.constrain(&grammar, Thoughts::Over).unwrap();
    assert_eq!(accept(&mut *constraint(), &bytes("true")), Ok(()));
    assert_eq!(accept(&mut *constraint(), &[CALL.0]), Ok(()));
}

#[test]
fn a_schema_that_does_not_compile_says_why() {
    let guides = guides();
    for schema in [
        json!({"type": "nonsense"}),
        json!({"$ref": "https://example.com/schema"}),
        json!({"type": "string", "pattern": "("}),
        json!({"allOf": [{"type": "string"}, {"type": "object"}]}),
    ] {
        let error = guides
            .constrain(&json_grammar(schema.clone()), Thoughts::Over)
            .err();
        assert!(
            matches!(error, Some(GrammarError::Compile { .. })),
            "{schema}"
        );
    }
}

#[test]
fn what_was_compiled_is_used_again_from_its_beginning() {
    let guides = guides();
    let schema = json_grammar(json!({"const": 12}));
    for _ in 0..2 {
        let mut constraint = guides.constrain(&schema, Thoughts::Over).unwrap();
        assert_eq!(accept(&mut *constraint, &bytes("12")), Ok(()));
    }
}

#[test]
fn what_would_take_gigabytes_is_refused_before_it_is_compiled() {
    let guides = guides();
    let refusal = |grammar: &Grammar| {
        let error = guides.constrain(grammar, Thoughts::Over).err();
        error.expect("it is refused").to_string()
    };
    let options = |count| vec![json!({"type": "object"}); count];
    let long = json!({"a": {"const": "x".repeat(800 << 10)}});
    let large = json!({"type": "object", "properties": long, "anyOf": options(9_500)});
    assert!(refusal(&json_grammar(large)).contains("must have at most 65536 bytes, got 9"));
    let long = json!({"a": {"const": "x".repeat(30 << 10)}});
    let copied = json!({"type": "object", "properties": long, "anyOf": options(1_500)});
    let reason = refusal(&json_grammar(copied));
    assert!(reason.contains("repeated for each"), "{reason}");
    let call = CallGrammar {
        name: "a".to_owned(),
        arguments: json!({"description": "x".repeat(60 << 10)}),
    };
    let calls = Grammar::Calls {
        calls: vec![call; 5],
        several: false,
    };
    let reason = refusal(&calls);
    assert!(
        reason.contains("the grammar must have at most 262144 bytes"),
        "{reason}"
    );
}

/// Each `a` doubles what the automaton has to tell apart.
#[test]
fn a_pattern_that_needs_too_many_states_ends_the_answer_and_says_so() {
    let guides = guides();
    let schema = json!({"type": "string", "pattern": "^(a|b)*a(a|b){16}$"});
    let mut constraint = guides
        .constrain(&json_grammar(schema), Thoughts::Over)
        .unwrap();
    let mut seed = 1_u32;
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if seed >> 31 == 0 { b'a' } else { b'b' }
    };
    constraint.push(u32::from(b'"')).unwrap();
    let mut drawn = 0;
    let error = loop {
        match constraint.allowed() {
            Ok(_) => constraint.push(u32::from(next())).unwrap(),
            Err(error) => break error,
        }
        drawn += 1;
        assert!(drawn < 200_000, "no end");
    };
    let text = error.to_string();
    assert!(
        text.contains("too many states") || text.contains("fuel"),
        "{text}"
    );
    assert!(constraint.allowed().is_err(), "it goes on");
}

/// The bounds on a mask leave room for what schemas have, over the vocabulary of the model.
#[test]
fn schemas_of_many_kinds_keep_within_the_bounds() {
    let tokenizer = Tokenizer::shared().unwrap();
    let word = |id| tokenizer.token_bytes(id).unwrap_or_default().to_vec();
    let ids = *tokenizer.ids();
    let guides = Guides::new(Vocabulary {
        words: (0..tokenizer.vocabulary()).map(word).collect(),
        control: tokenizer.controls().to_vec(),
        end: ids.turn_close,
        call: (ids.call_open, ids.call_close),
        thought: (ids.thought_open, ids.thought_close),
    })
    .unwrap();
    let optional: serde_json::Map<String, Value> = (0..60)
        .map(|i| {
            let schema = json!({"anyOf": [{"type": "string", "maxLength": 200}, {"type": "null"}]});
            (format!("optional_{i}"), schema)
        })
        .collect();
    let words: Vec<String> = (0..300)
        .map(|i| format!("{}-{i}", "word".repeat(i % 5)))
        .collect();
    let schema = json!({
        "type": "object",
        "properties": {
            "when": {"type": "string", "format": "date-time"},
            "who": {"type": "string", "format": "email"},
            "id": {"type": "string", "format": "uuid"},
            "where": {"type": "string", "format": "uri"},
            "code": {"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]{4,12}$"},
            "word": {"enum": words},
            "number": {"type": "number", "minimum": -1.5, "maximum": 1_000_000},
            "list": {"type": "array", "minItems": 1, "maxItems": 50, "items": {"$ref": "#/$defs/point"}},
            "more": {"type": "object", "properties": optional},
        },
        "required": ["when", "who", "id", "where", "code", "word", "number", "list", "more"],
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"], "additionalProperties": false}},
    });
    let answer = json!({
        "when": "2026-11-30T06:17:47Z", "who": "someone@example.com", "id": "123e4567-e89b-12d3-a456-426614174000",
        "where": "https://example.com/a/b?c=d#e", "code": "ABC-12345", "word": "wordwordword-13", "number": 12.5,
        "list": [{"x": 1, "y": -2}, {"x": 30, "y": 4}],
        "more": {"optional_3": "a \"word\" — and more", "optional_59": null},
    });
    let mut constraint = guides
        .constrain(&json_grammar(schema), Thoughts::Over)
        .unwrap();
    // In the schema's order, which objects keep.
    let mut text = tokenizer.encode(&answer.to_string());
    text.push(ids.turn_close);
    assert_eq!(accept(&mut *constraint, &text), Ok(()));
}
