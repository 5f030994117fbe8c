//! Makes sapling, the small demonstration model: its vocabulary, its first weights, what it learns from; and asks a
//! trained one what it can do.
//!
//! `make sapling` runs the parts in order (`make.sh`); training itself is `espalier train`.

mod lessons;
mod probe;
mod rows;
mod seedling;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use espalier_qwen3_text::Tokenizer;

/// What goes wrong.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("a file cannot be read or written")]
    File(#[from] std::io::Error),
    #[error("the teacher made a mistake")]
    Teacher(#[from] espalier_practice::teacher::NotTaught),
    #[error("a lesson cannot be rendered")]
    Render(#[from] espalier_dataset::RenderError),
    #[error("the vocabulary cannot be learned")]
    Learn(#[from] espalier_qwen3_text::LearnError),
    #[error("the vocabulary cannot be read")]
    Vocabulary(#[from] espalier_qwen3_text::TokenizerError),
    #[error("Qwen3's own vocabulary cannot be read: {0}")]
    Own(&'static espalier_qwen3_text::LoadError),
    #[error("the weights cannot be written")]
    Weights(#[from] safetensors::SafeTensorError),
    #[error("the configuration cannot be read")]
    Config(#[from] espalier_qwen3::ConfigError),
    #[error("the model does not answer")]
    Asked(#[from] reqwest::Error),
    #[error("a thread ended early")]
    Thread,
}

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Writes a model's folder: vocabulary and configuration, with weights that are drawn
    Seedling {
        /// Folder to write
        folder: PathBuf,
    },
    /// Writes rows of tokens for `espalier train --rows`
    Rows {
        /// Folder with the vocabulary
        folder: PathBuf,
        /// File to write
        out: PathBuf,
        /// How many tokens
        #[arg(long, default_value_t = 1_000_000)]
        tokens: u64,
        /// Which of 64 parts, of which no two have a site in common; the last is to be measured on
        #[arg(long, default_value_t = 0)]
        part: u64,
    },
    /// Lets a served model do tasks on the twin of the site, and counts what it solves
    Probe(probe::Args),
    /// Shows one lesson as text
    Show {
        /// Which
        #[arg(default_value_t = 0)]
        n: usize,
    },
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    match Line::parse().command {
        Command::Seedling { folder } => seedling::write(&folder)?,
        Command::Rows {
            folder,
            out,
            tokens,
            part,
        } => {
            let json = std::fs::read_to_string(folder.join("tokenizer.json"))?;
            rows::write(&out, tokens, part, &Tokenizer::from_json(&json)?)?;
        }
        Command::Probe(args) => probe::run(&args)?,
        Command::Show { n } => {
            let own = Tokenizer::shared().map_err(Failed::Own)?;
            let mut lessons = lessons::Lessons::new(0, 1, own);
            let mut lesson = lessons.next()?;
            for _ in 0..n {
                lesson = lessons.next()?;
            }
            println!("{}", seedling::text(&lesson.messages)?);
        }
    }
    Ok(())
}
