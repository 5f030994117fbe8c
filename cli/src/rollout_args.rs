//! The options of a command that runs rollouts in its own process: the model, the MCP servers and their browsers.
//! `up` and `chat` take them; `up::Settings` joins them with the file.

use std::path::PathBuf;

use clap::Args;

use crate::client::ServedModel;

/// What a rollout needs.
#[derive(Args, Clone, Debug, Default)]
pub struct RolloutArgs {
    /// OpenAI-compatible endpoint, up to and including the version, such as http://localhost:8000/v1 [default of `up`:
    /// the model is served in the same process; of `chat`: the one that `up` serves]
    #[arg(long, value_name = "URL")]
    pub model_url: Option<String>,
    /// Name of the model at that endpoint; without one, of `up` what `espalier-infer-worker --model` takes, of `chat` the
    /// model that `up` serves or an adapter of it
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// What is asked where no endpoint is named.
    #[arg(skip)]
    pub served: Option<ServedModel>,
    /// Environment variable that holds the endpoint's API key
    #[arg(long, value_name = "VAR")]
    pub api_key_env: Option<String>,
    /// MCP servers, in the form that Claude Desktop and Cursor read [default: a built-in server `browser`]
    #[arg(long, value_name = "FILE")]
    pub mcp: Option<PathBuf>,
    /// Shows the windows of browsers
    #[arg(long)]
    pub headed: bool,
    /// Folder that holds node_modules/@playwright/mcp
    #[arg(long, value_name = "DIR", hide_short_help = true)]
    pub playwright_dir: Option<PathBuf>,
}
