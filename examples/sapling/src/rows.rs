//! Rows of tokens for `espalier train --rows`.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use espalier_dataset::Renderer;
use espalier_qwen3_text::Tokenizer;
use serde_json::{Value, json};

use crate::Failed;
use crate::lessons::{Lesson, Lessons, tools};

/// Writes lessons of about `tokens` tokens together, of sites that no other `part` has.
///
/// # Errors
/// What cannot be written, or rendered.
pub fn write(path: &Path, tokens: u64, part: u64, tokenizer: &Tokenizer) -> Result<(), Failed> {
    let out = Mutex::new(BufWriter::new(File::create(path)?));
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let (done, rows) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let each = |thread: u64| {
            let (out, done, rows) = (&out, &done, &rows);
            scope.spawn(move || -> Result<(), Failed> {
                let mut lessons = Lessons::new(part * threads + thread, 64 * threads, tokenizer);
                let mut renderer = Renderer::new(tokenizer);
                let tools = tools();
                while done.load(Ordering::Relaxed) < tokens {
                    let n = rows.fetch_add(1, Ordering::Relaxed);
                    let lesson = lessons.next()?;
                    let (row, count) = row(n, &lesson, &tools, &mut renderer)?;
                    done.fetch_add(count, Ordering::Relaxed);
                    let mut out = out
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner);
                    writeln!(out, "{row}")?;
                }
                Ok(())
            })
        };
        let writers: Vec<_> = (0..threads).map(each).collect();
        writers
            .into_iter()
            .try_for_each(|writer| match writer.join() {
                Ok(written) => written,
                Err(_) => Err(Failed::Thread),
            })
    })?;
    out.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .flush()?;
    Ok(())
}

fn row(
    n: u64,
    lesson: &Lesson,
    tools: &[Value],
    renderer: &mut Renderer,
) -> Result<(Value, u64), Failed> {
    let said = lesson
        .messages
        .iter()
        .filter(|m| m.role() == "assistant")
        .count() as u32;
    let every: Vec<u32> = (0..said).collect();
    let rendered = renderer.render(&lesson.messages, tools, &every)?;
    let count = rendered.ids.len() as u64;
    let supervised: Vec<[u64; 2]> = match lesson.is_whole {
        true => vec![[1, count]],
        false => {
            let range = |turn: &std::ops::Range<u32>| [u64::from(turn.start), u64::from(turn.end)];
            rendered.turns.iter().map(range).collect()
        }
    };
    let row = json!({"id": n.to_string(), "ids": rendered.ids, "supervised": supervised});
    Ok((row, count))
}
