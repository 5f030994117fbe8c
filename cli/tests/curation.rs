//! Curation end to end: the real command over a store of files, from the workshop's traces to corrected ones.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// A store, a data folder and a folder of files, and the command that knows them.
struct Desk {
    folder: tempfile::TempDir,
}

impl Desk {
    /// Two traces of batch `w`: `a` asks twice, `b` once.
    fn new() -> Self {
        let desk = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let system = json!({"role": "system", "content": "be brief"});
        let hint = json!({"role": "system", "content": "the footer has it", "hint": true});
        let user = |text: &str| json!({"role": "user", "content": text});
        let call = json!({"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "open", "arguments": "{\"url\":\"x\"}"}}]});
        let result = json!({"role": "tool", "tool_call_id": "c1", "content": "5 \u{1b}[31meuros"});
        let answer = |text: &str| json!({"role": "assistant", "content": text});
        let a = json!([
            system,
            hint,
            user("price?"),
            call,
            result,
            answer("5"),
            user("tax?"),
            answer("1")
        ]);
        let b = json!([system, user("cup?"), call, result, answer("4")]);
        for (name, messages) in [("a", a), ("b", b)] {
            let tool = json!({"type": "function", "function": {"name": "open", "description": "opens",
                "parameters": {"type": "object"}}});
            let file = json!({"timestamp": "20250529_130900", "model": "m", "messages": messages,
                "tools": [tool]});
            std::fs::write(desk.path(&format!("{name}.json")), file.to_string()).unwrap();
        }
        let (a, b) = (desk.path("a.json"), desk.path("b.json"));
        desk.json(&["import", "--batch", "w", &a, &b]);
        desk
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_espalier"));
        command
            .env_clear()
            .env("USER", "ann")
            .env("PATH", "/usr/bin:/bin")
            .env("ESPALIER_DATA_DIR", self.path("data"))
            .arg("traces")
            .args(words)
            .args(["--store", &format!("file://{}", self.path("store"))])
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// What a command says that succeeds.
    fn text(&self, words: &[&str]) -> String {
        succeeded(words, self.run(words))
    }

    fn json(&self, words: &[&str]) -> Value {
        let words: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
        serde_json::from_str(&self.text(&words)).unwrap()
    }

    /// What a command says that refuses its input.
    fn refusal(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        said
    }

    /// The names and the messages of an export.
    fn exported(&self, more: &[&str]) -> Vec<(String, Vec<Value>)> {
        let out = tempfile::tempdir_in(self.folder.path()).unwrap();
        let folder = out.path().display().to_string();
        let words = ["export", "w", "--out", &folder];
        let words: Vec<&str> = words.iter().chain(more).copied().collect();
        self.text(&words);
        let mut files: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        let read = |path: &Path| {
            let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            file["messages"].as_array().unwrap().clone()
        };
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        files.iter().map(|path| (name(path), read(path))).collect()
    }
}

fn succeeded(words: &[&str], output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn contents(messages: &[Value]) -> Vec<&str> {
    messages
        .iter()
        .map(|message| message["content"].as_str().unwrap())
        .collect()
}

#[test]
fn a_turn_is_corrected_shown_exported_and_taken_back() {
    let desk = Desk::new();
    let recorded = desk.exported(&[]);
    let content = ["edit", "w/a", "--turn", "2", "--content", "it is 5 €"];
    let noted: Vec<&str> = content.iter().copied().chain(["--note", "euros"]).collect();
    let written = desk.json(&noted);
    assert_eq!(
        written["traces"][0],
        json!({"job": "default/w/a", "patch": 0, "kind": "edit"})
    );
    assert_eq!(
        desk.json(&content)["unchanged"],
        1,
        "it is like that already"
    );

    let diff = desk.text(&["show", "w/a", "--diff"]);
    let expected = "\
--- recorded
+++ after 1 correction
@@ -15,7 +15,7 @@
 === message 4 tool
   5 \u{fffd}[31meuros
 === turn 2 content
-  5
+  it is 5 €
 === message 6 user
   tax?
 === turn 3 content
";
    assert_eq!(diff, expected);
    let shown = desk.json(&["show", "w/a"]);
    let conversation = &shown["curation"]["conversations"][0];
    assert_eq!(conversation["messages"][5]["content"], "it is 5 €");
    assert_eq!(
        shown["messages"][5]["content"], "5",
        "what was recorded stays"
    );
    assert_eq!(contents(&desk.exported(&[])[0].1)[5], "it is 5 €");
    assert_eq!(desk.exported(&["--raw"]), recorded);

    // Somebody who had seen no correction means another turn than there is now.
    let late = [
        "edit",
        "w/a",
        "--turn",
        "2",
        "--content",
        "x",
        "--seen",
        "0",
    ];
    let said = desk.refusal(&late);
    assert!(
        said.contains("must not have changed since it was looked at"),
        "{said}"
    );
    desk.text(&[
        "edit",
        "w/a",
        "--turn",
        "3",
        "--content",
        "2",
        "--seen",
        "0",
    ]);

    desk.text(&["undo", "w/a"]);
    desk.text(&["undo", "w/a"]);
    assert_eq!(desk.exported(&[]), recorded);
    let log = desk.json(&["log", "w/a"]);
    let entries = log["log"].as_array().unwrap();
    let counts: Vec<&Value> = entries.iter().map(|entry| &entry["counts"]).collect();
    assert_eq!(counts, [false, false, true, true]);
    assert_eq!(
        (&entries[0]["by"], &entries[0]["why"]),
        (&json!("ann"), &json!("euros"))
    );
    assert!(desk.refusal(&["undo", "w/a"]).contains("no correction"));
    desk.text(&["undo", "w/a", "3"]);
    assert_eq!(
        contents(&desk.exported(&[])[0].1)[5],
        "it is 5 €",
        "taken back itself"
    );
    assert!(desk.text(&["log", "w/a"]).contains("turn 2: content"));
}

#[test]
fn traces_are_labelled_dropped_and_filtered_as_a_batch() {
    let desk = Desk::new();
    desk.text(&["label", "w/a", "w/b", "stage=gold", "--reward", "1"]);
    desk.text(&["label", "w/a", "--accept", "--remove", "stage"]);
    let listed = desk.json(&["list", "w"]);
    let of = |n: usize, key: &str| listed["traces"][n][key].clone();
    assert_eq!(
        (of(0, "judgement"), of(1, "judgement")),
        (json!("accepted"), json!(null))
    );
    assert_eq!(of(1, "labels"), json!({"stage": "gold"}));
    assert_eq!(listed["traces"][0]["summary"]["reward"], 1.0);
    assert_eq!(desk.exported(&["--accepted"]).len(), 1);

    desk.text(&[
        "drop",
        "--batch",
        "w",
        "--solved",
        "--note",
        "the site was down",
    ]);
    assert_eq!(desk.exported(&[]), []);
    assert_eq!(desk.exported(&["--raw"]).len(), 2);
    assert!(desk.text(&["list", "w"]).contains("accepted, dropped"));
    desk.text(&["undrop", "w/a", "w/b"]);
    desk.text(&["label", "w/b", "--reject"]);
    let names: Vec<String> = desk
        .exported(&[])
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["a.json"]);

    for (words, says) in [
        (
            vec!["label", "w/a", "--reward", "1.5"],
            "`reward` must be in [0, 1], got `1.5`",
        ),
        (vec!["label", "w/a"], "nothing is said"),
        (vec!["label", "--accept"], "no trace is named"),
        (vec!["drop", "w/a", "--solved"], "--batch"),
        (vec!["drop", "w/nobody"], "no trace of `default/w/nobody`"),
        (
            vec!["edit", "w/a", "--turn", "9", "--content", "x"],
            "one of the 3 turns",
        ),
        (
            vec!["edit", "w/a", "w/b", "--cut-after", "1"],
            "in one trace",
        ),
        (
            vec![
                "edit",
                "w/a",
                "--message",
                "3",
                "--content",
                "x",
                "--hint",
                "2",
            ],
            "a system message",
        ),
    ] {
        let said = desk.refusal(&words);
        assert!(said.contains(says), "{words:?}: {said}");
    }
}

#[test]
fn conversations_are_cut_split_and_merged() {
    let desk = Desk::new();
    desk.text(&["edit", "w/b", "--cut-after", "1", "--answer", "five"]);
    desk.text(&["merge", "w/a", "w/b"]);
    let merged = desk.exported(&[]);
    assert_eq!(merged.len(), 1);
    let texts = contents(&merged[0].1);
    assert_eq!((texts[7], texts[8], texts[11]), ("1", "cup?", "five"));
    assert_eq!(
        merged[0].1[10]["tool_call_id"], "c1+",
        "ids are one conversation's own"
    );

    desk.text(&["split", "w/a", "--before", "4", "--before", "3"]);
    desk.text(&["edit", "w/a", "--drop-hints"]);
    let names: Vec<String> = desk
        .exported(&[])
        .iter()
        .map(|(name, _)| name.clone())
        .collect();
    assert_eq!(names, ["a#2.json", "a#3.json", "a.json"]);
    let third = &desk.exported(&[])[1].1;
    assert_eq!(contents(third)[..2], ["be brief", "cup?"]);

    // What a later correction needs is kept: the split names a message of the merged trace.
    let said = desk.refusal(&["undo", "w/a", "0"]);
    assert!(said.contains("patch 1 needs it"), "{said}");
    let said = desk.refusal(&["merge", "w/b", "w/b"]);
    assert!(said.contains("with itself"), "{said}");
}

#[test]
fn a_conversation_is_edited_in_an_editor() {
    let desk = Desk::new();
    let edit = |editor: &str| {
        let mut command = desk.command(&["edit", "w/a", "--editor"]);
        command.env("EDITOR", editor).output().unwrap()
    };
    succeeded(&["editor"], edit("sed -i s/tax?/VAT?/"));
    assert_eq!(contents(&desk.exported(&[])[0].1)[6], "VAT?");
    assert!(succeeded(&["editor"], edit("true")).contains("nothing to change"));
    assert_eq!(edit("false").status.code(), Some(1));

    let output = edit("sed -i s/^===.turn.2/turn.2/");
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("must begin with two spaces"), "{said}");
    let kept = said
        .split("--form ")
        .nth(1)
        .unwrap()
        .split('`')
        .next()
        .unwrap();
    let mended = std::fs::read_to_string(kept).unwrap();
    let mended = mended
        .replace("turn.2", "=== turn 2")
        .replace("  5\n", "  five\n");
    std::fs::write(kept, mended).unwrap();
    desk.text(&["edit", "w/a", "--form", kept]);
    std::fs::remove_file(kept).unwrap();
    assert_eq!(contents(&desk.exported(&[])[0].1)[5], "five");
}

#[test]
fn corrections_of_several_at_once_all_count() {
    let desk = Desk::new();
    let children: Vec<_> = (0..4)
        .map(|n| {
            let label = format!("n{n}=x");
            let mut command = desk.command(&["label", "w/a", &label]);
            command.stdout(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let labels = &desk.json(&["list", "w"])["traces"][0]["labels"];
    assert_eq!(labels.as_object().unwrap().len(), 4, "{labels}");
}
