//! What every command is given: where to write, where the coordinator and the data folder are, the environment.

use std::path::PathBuf;

use clap::Args;
use espalier_core::id::ProjectId;
use espalier_runtime::config::Environment;
use espalier_runtime::net::ClientTls;

use crate::client::{self, Client, Target, UpFile};
use crate::exit::Problem;
use crate::output::Out;

/// The project of `up`, and of every command that is told no other.
pub const PROJECT_DEFAULT: &str = "default";

/// Options that every command takes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// JSON on standard output instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Folder of `espalier up` [default: ~/.local/share/espalier]
    #[arg(long, global = true, value_name = "DIR", env = "ESPALIER_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Coordinator, such as http://127.0.0.1:7411, or several with commas between them; the token goes in
    /// ESPALIER_TOKEN [default: the running `up`]
    #[arg(long, global = true, value_name = "URL", env = "ESPALIER_URL")]
    pub url: Option<String>,
    /// PEM file of trusted authorities, for an https:// coordinator
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/etc/ssl/certs/ca-certificates.crt",
        hide_short_help = true
    )]
    pub ca: PathBuf,
}

/// What every command is given.
#[derive(Clone, Debug)]
pub struct Context {
    /// Standard output.
    pub out: Out,
    /// The process's variables, read once.
    pub environment: Environment,
    global: Global,
}

impl Context {
    /// Joins options and environment.
    pub fn new(global: Global, environment: Environment) -> Self {
        let no_color = environment
            .get("NO_COLOR")
            .is_some_and(|text| !text.is_empty());
        Self {
            out: Out::new(global.json, no_color),
            environment,
            global,
        }
    }

    /// The folder of `up`.
    pub fn data_dir(&self) -> Result<PathBuf, Problem> {
        client::data_dir(self.global.data_dir.as_deref(), &self.environment)
    }

    /// Where the coordinator is.
    pub fn target(&self) -> Result<Target, Problem> {
        match &self.global.url {
            Some(url) => Ok(Target::named(url, &self.environment)),
            None => Target::local(&self.data_dir()?),
        }
    }

    /// A connection to the coordinator.
    pub async fn client(&self) -> Result<Client, Problem> {
        self.connect(self.target()?).await
    }

    /// A connection for looking after the system, which takes another token than submitting does: a remote
    /// coordinator's is the one token that is named.
    pub async fn operator(&self) -> Result<Client, Problem> {
        let target = match &self.global.url {
            Some(url) => Target::named(url, &self.environment),
            None => Target::local_operator(&self.data_dir()?)?,
        };
        self.connect(target).await
    }

    async fn connect(&self, target: Target) -> Result<Client, Problem> {
        let tls = target.url.starts_with("https://").then(|| ClientTls {
            ca: self.global.ca.clone(),
            server_name: None,
            cert: None,
            key: None,
        });
        Client::connect(&target, tls.as_ref()).await
    }

    /// What a running `up` said of itself; none where a remote coordinator was named.
    pub fn up_file(&self) -> Result<Option<UpFile>, Problem> {
        match self.global.url {
            Some(_) => Ok(None),
            None => UpFile::read(&self.data_dir()?),
        }
    }

    /// Where the traces of the local `up` are, running or not; none where a remote coordinator was named.
    pub fn store_url(&self) -> Result<Option<String>, Problem> {
        if self.global.url.is_some() {
            return Ok(None);
        }
        if let Some(up) = self.up_file()? {
            return Ok(Some(up.store));
        }
        let folder = client::store_dir(&self.data_dir()?);
        Ok(folder
            .is_dir()
            .then(|| format!("file://{}", folder.display())))
    }

    /// The project whose traces are meant: `ESPALIER_PROJECT`, the running `up`'s, or the default one.
    pub fn project(&self) -> Result<ProjectId, Problem> {
        if let Some(name) = self.environment.get("ESPALIER_PROJECT") {
            return Ok(ProjectId::new(name)?);
        }
        let up = self.up_file()?;
        let name = up.map_or_else(|| PROJECT_DEFAULT.to_owned(), |up| up.project);
        Ok(ProjectId::new(name)?)
    }
}
