//! `espalier up` as a user starts it, on a folder of the test's own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tempfile::TempDir;

use super::client::Client;
use super::disk::SmallDisk;
use super::process::{Process, binary};
use super::trail::Trail;
use super::wait_for;

/// Long enough for two busy cores; a hang is told apart from slowness by the tests' own deadlines.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// What `espalier up` says of itself, for the other commands to read.
#[derive(Clone, Debug, Deserialize)]
pub struct UpFile {
    /// Address of the coordinator.
    pub url: String,
    /// A token that submits and looks.
    pub token: String,
    /// A token that looks after the workers.
    pub admin_token: String,
    /// Address of the object store.
    pub store: String,
}

/// A running `espalier up`.
#[derive(Debug)]
pub struct Up {
    /// Its data and logs.
    pub folder: TempDir,
    /// The process; replaced by [`Up::restart`].
    pub process: Process,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    trail: Trail,
    /// The disk of its data, where that is a small one.
    pub disk: Option<SmallDisk>,
}

/// The address of a toy stdio MCP server, as an `mcpServers` file.
pub fn toy_servers() -> serde_json::Value {
    json!({"mcpServers": {"toy": {"command": binary("toy-mcp")}}})
}

impl Up {
    /// Starts it with these MCP servers, this model endpoint and further arguments, and waits until it serves.
    pub async fn start(mcp: &serde_json::Value, model_url: &str, more: &[&str]) -> Self {
        Self::start_in(
            TempDir::new().expect("a temporary folder"),
            mcp,
            model_url,
            more,
            &[],
        )
        .await
    }

    /// The same, on a folder that is there already, with further environment.
    pub async fn start_in(
        folder: TempDir,
        mcp: &serde_json::Value,
        model_url: &str,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let model = elsewhere(model_url);
        let mut up = Self::spawn_in(folder, mcp, &model, more, environment, None);
        up.wait_until_ready().await;
        up
    }

    /// Starts it with a model that it serves itself, and does not wait for anything.
    pub fn spawn_serving(
        folder: TempDir,
        mcp: &serde_json::Value,
        model: &Path,
        more: &[&str],
    ) -> Self {
        let model = model.display().to_string();
        // Rollouts that run when it is told to end are to end by themselves.
        let environment = [("ESPALIER_UP_GRACE_S", "120")];
        Self::spawn_in(folder, mcp, &["--model", &model], more, &environment, None)
    }

    /// The same, with all of its data on a disk of `bytes`; none where [`SmallDisk::mount`] gives none.
    pub async fn start_on_small_disk(
        bytes: u64,
        mcp: &serde_json::Value,
        model_url: &str,
        more: &[&str],
    ) -> Option<Self> {
        let folder = TempDir::new().expect("a temporary folder");
        let disk = SmallDisk::mount(&folder.path().join("data"), bytes)?;
        let mut up = Self::spawn_in(folder, mcp, &elsewhere(model_url), more, &[], Some(disk));
        up.wait_until_ready().await;
        Some(up)
    }

    fn spawn_in(
        folder: TempDir,
        mcp: &serde_json::Value,
        model: &[&str],
        more: &[&str],
        environment: &[(&str, &str)],
        disk: Option<SmallDisk>,
    ) -> Self {
        let mcp_file = folder.path().join("mcp.json");
        std::fs::write(&mcp_file, mcp.to_string()).expect("the test's folder is writable");
        let mcp_file = mcp_file.display().to_string();
        let arguments = ["up", "--mcp", &mcp_file].into_iter();
        let arguments = arguments.chain(model.iter().copied());
        let mut arguments: Vec<String> = arguments.map(str::to_owned).collect();
        if !more.contains(&"--listen") {
            arguments.extend(["--listen", "127.0.0.1:0"].map(str::to_owned));
        }
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        let trail = Trail::new(folder.path().join("tmp"));
        let environment: Vec<(String, String)> = environment
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let process = spawn(
            folder.path(),
            &arguments,
            &environment,
            &trail,
            disk.as_ref(),
        );
        Self {
            folder,
            process,
            arguments,
            environment,
            trail,
            disk,
        }
    }

    /// Starts it again on the same data, after its process ended.
    pub async fn restart(&mut self) {
        let _ = std::fs::remove_file(self.file_path());
        self.process = spawn(
            self.folder.path(),
            &self.arguments,
            &self.environment,
            &self.trail,
            self.disk.as_ref(),
        );
        self.wait_until_ready().await;
    }

    /// What it said of itself.
    pub fn file(&self) -> UpFile {
        let text =
            std::fs::read_to_string(self.file_path()).expect("up.json is there once it serves");
        serde_json::from_str(&text).expect("up.json has url, token and store")
    }

    /// A client with its token.
    pub async fn client(&self) -> Client {
        let file = self.file();
        Client::connect(&file.url, &file.token).await
    }

    /// The folder behind its `file://` store.
    pub fn store_folder(&self) -> PathBuf {
        self.seen(Path::new(self.file().store.trim_start_matches("file://")))
    }

    /// Processes that it started and that are still there, itself included.
    pub fn processes(&self) -> Vec<(u32, String)> {
        self.trail.processes()
    }

    /// Waits until nothing is left of it and of what it started: no process and no temporary file.
    pub async fn wait_until_gone(&self, deadline: Duration) {
        self.trail.wait_until_cold(deadline).await;
    }

    fn file_path(&self) -> PathBuf {
        self.seen(&self.folder.path().join("data/up.json"))
    }

    /// Where a path of the process's lies for the test.
    fn seen(&self, path: &Path) -> PathBuf {
        match &self.disk {
            Some(disk) => disk.seen(path),
            None => path.to_owned(),
        }
    }

    /// Waits until it serves.
    pub async fn wait_until_ready(&mut self) {
        let path = self.file_path();
        let process = &mut self.process;
        wait_for("`espalier up` to serve", START_DEADLINE, || {
            let ended = process.ended();
            assert!(
                ended.is_none(),
                "`espalier up` ended with {ended:?}:\n{}",
                process.log()
            );
            let there = std::fs::read_to_string(&path)
                .ok()
                .and_then(|t| serde_json::from_str::<UpFile>(&t).ok());
            async move { there.ok_or("no up.json yet") }
        })
        .await;
    }
}

/// The options that name the scripted model at `url`.
fn elsewhere(url: &str) -> [&str; 4] {
    ["--model", "scripted", "--model-url", url]
}

fn spawn(
    folder: &Path,
    arguments: &[String],
    environment: &[(String, String)],
    trail: &Trail,
    disk: Option<&SmallDisk>,
) -> Process {
    let mut command = Command::new(binary("espalier"));
    command
        .args(arguments)
        .arg("--data-dir")
        .arg(folder.join("data"));
    command.envs(environment.iter().cloned());
    trail.lay(&mut command);
    // From the root of the tree, where the locked Playwright package is found.
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let command = match disk {
        Some(disk) => disk.command(&command),
        None => command,
    };
    Process::start("up", command, folder)
}
