//! Writes `tasks.jsonl` anew after the generator changed; a test fails while the committed file is old.

use espalier_practice::tasks::{COMMITTED_TASKS, DEFAULT_SEED, Split, generate};

fn main() -> std::io::Result<()> {
    let lines: String = generate(DEFAULT_SEED, COMMITTED_TASKS, Split::Train)
        .iter()
        .map(|task| format!("{task}\n"))
        .collect();
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tasks.jsonl"), lines)
}
