//! What a guide of this repository has its reader do.

use std::path::Path;
use std::process::Command;

use super::process::binary;

/// The blocks of `docs/guides/{name}.md` in a language, such as `sh`, in their order.
///
/// # Panics
/// When there is no such guide.
pub fn blocks(name: &str, language: &str) -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guides");
    let guide = std::fs::read_to_string(folder.join(format!("{name}.md"))).expect("a guide");
    let mut blocks = Vec::new();
    let mut open: Option<(bool, String)> = None;
    for line in guide.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(tag), None) => open = Some((tag == language, String::new())),
            (Some(_), Some(_)) => {
                if let Some((true, block)) = open.take() {
                    blocks.push(block);
                }
                open = None;
            }
            (None, Some((_, block))) => *block += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    blocks
}

/// A shell that does `words`, with the programs of this workspace in its path, up to the first that fails.
pub fn shell(words: &str) -> Command {
    let mut command = Command::new("bash");
    let words = format!("PATH=\"$(dirname \"$0\"):$PATH\"\n{words}");
    command.args(["-euc", &words]).arg(binary("espalier"));
    command
}
