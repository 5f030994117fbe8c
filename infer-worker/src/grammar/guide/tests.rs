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
    for i in 0..COMPILED_MAX + 2 {
        let schema = json_grammar(json!({"const": i}));
        for _ in 0..2 {
            let mut constraint = guides.constrain(&schema, Thoughts::Over).unwrap();
            assert_eq!(accept(&mut *constraint, &bytes(&i.to_string())), Ok(()));
        }
    }
    assert_eq!(guides.compiled.lock().unwrap().len(), COMPILED_MAX);
}
