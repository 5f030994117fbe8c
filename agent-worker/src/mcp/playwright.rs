//! How the pinned Playwright MCP is found and started. What its tools mean is `browser`'s, who shares it is `pool`'s.
//!
//! Everything is passed in a generated configuration file; see `docs/decisions/browser-isolation.md` for the two
//! scripts that are loaded into the server.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::child::{Launch, find_program, inherited};
use super::config::PlaywrightOptions;
use super::redact::Secrets;

/// Makes the server listen on a Unix socket, and on nothing else.
const LISTEN_UNIX: &str = include_str!("playwright/listen_unix.cjs");
/// Turns the crash of a page into the loss of its context.
const INIT_PAGE: &str = include_str!("playwright/init_page.cjs");
const CHROMIUM_NAMES: &[&str] = &[
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
];
/// How long a client may be silent before the server drops its context: longer than a busy worker ever is, short
/// enough that the contexts of a dead one do not pile up.
const PING_TIMEOUT_MS: u32 = 60_000;
/// The file of the socket within the server's folder.
const SOCKET_FILE: &str = "server.sock";
/// Longest path of a Unix socket, less the byte that ends it (`unix(7)`).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Where the parts are on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Installation {
    node: PathBuf,
    cli: PathBuf,
    chromium: PathBuf,
    /// Version of `@playwright/mcp`.
    pub version: String,
}

#[derive(Deserialize)]
struct Package {
    version: String,
}

impl Installation {
    /// Finds node, the package and the browser, or says what is missing and what to do about it.
    pub(super) fn find(
        options: &PlaywrightOptions,
        default_dir: Option<&Path>,
        env: &BTreeMap<String, String>,
    ) -> Result<Self, String> {
        let given = |path: &Path, key: &str| {
            let text = path.to_string_lossy();
            find_program(&text, env).ok_or(format!("`{key}` is {text}, which is no program"))
        };
        let node = match &options.node {
            Some(path) => given(path, "node")?,
            None => find_program("node", env)
                .ok_or("no `node` in PATH; install Node.js 20 or newer, or run `make setup`")?,
        };
        let chromium = match &options.chromium {
            Some(path) => given(path, "chromium")?,
            None => CHROMIUM_NAMES
                .iter()
                .find_map(|name| find_program(name, env))
                .ok_or_else(|| {
                    format!(
                        "none of {} in PATH; install Chromium, or run `make setup`",
                        CHROMIUM_NAMES.join(", ")
                    )
                })?,
        };
        let dir = options.playwright_dir.as_deref().or(default_dir).ok_or(
            "`playwright_dir` is not set; it names the folder that holds node_modules/@playwright/mcp",
        )?;
        let package = dir.join("node_modules/@playwright/mcp");
        let version = std::fs::read(package.join("package.json"))
            .ok()
            .and_then(|text| serde_json::from_slice::<Package>(&text).ok())
            .ok_or_else(|| {
                let dir = dir.display();
                format!("no Playwright MCP in {dir}; run `make setup`, or `npm ci --ignore-scripts` in that folder")
            })?
            .version;
        Ok(Self {
            node,
            cli: package.join("cli.js"),
            chromium,
            version,
        })
    }

    /// The browser's program.
    pub(super) fn chromium(&self) -> &Path {
        &self.chromium
    }

    /// What servers have to agree in to be shared.
    pub(super) fn digest(&self, options: &PlaywrightOptions) -> [u8; 32] {
        let settings = json!([options, self.node, self.cli, self.chromium]);
        Sha256::digest(settings.to_string()).into()
    }

    /// Writes the server's files into `dir`, which is private to it, and says how to start it. `shared`: it listens on
    /// [`socket`]; otherwise it talks on its pipes.
    pub(super) fn prepare(
        &self,
        options: &PlaywrightOptions,
        dir: &Path,
        shared: bool,
        env: &BTreeMap<String, String>,
    ) -> io::Result<Launch> {
        let [config, init_page, listen_unix] =
            ["config.json", "init_page.cjs", "listen_unix.cjs"].map(|name| dir.join(name));
        let [temporary, home] = ["tmp", "home"].map(|name| dir.join(name));
        std::fs::create_dir_all(&temporary)?;
        std::fs::create_dir_all(&home)?;
        std::fs::write(&init_page, INIT_PAGE)?;
        std::fs::write(
            &config,
            self.config(options, &init_page, shared).to_string(),
        )?;

        let mut variables = inherited(env);
        if !options.headed {
            variables.insert("HOME".to_owned(), text(&home)?);
        }
        for name in ["TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"] {
            variables.insert(name.to_owned(), text(&temporary)?);
        }
        variables.insert(
            "PLAYWRIGHT_MCP_PING_TIMEOUT_MS".to_owned(),
            PING_TIMEOUT_MS.to_string(),
        );
        let mut args = Vec::new();
        if shared {
            let socket = text(&socket(dir))?;
            if socket.len() > SOCKET_PATH_BYTES_MAX {
                let reason = format!(
                    "the path of the socket {socket} is too long; choose a shorter temporary folder"
                );
                return Err(io::Error::other(reason));
            }
            std::fs::write(&listen_unix, LISTEN_UNIX)?;
            variables.insert("ESPALIER_MCP_SOCKET".to_owned(), socket);
            args.extend(["--require".to_owned(), text(&listen_unix)?]);
        }
        args.extend([text(&self.cli)?, "--config".to_owned(), text(&config)?]);
        Ok(Launch {
            program: self.node.clone(),
            args,
            env: variables,
            cwd: dir.to_owned(),
            secrets: Secrets::of_command(&options.chromium_args, &options.proxy),
        })
    }

    fn config(
        &self,
        options: &PlaywrightOptions,
        init_page: &Path,
        shared: bool,
    ) -> serde_json::Value {
        let mut chromium_args = vec!["--disable-quic".to_owned()];
        if !options.headed {
            chromium_args.push("--disable-gpu".to_owned());
        }
        chromium_args.extend(options.chromium_args.iter().cloned());
        let mut launch = json!({
            "executablePath": self.chromium,
            "headless": !options.headed,
            // Chromium refuses to sandbox what root started.
            "chromiumSandbox": !rustix::process::geteuid().is_root(),
            "args": chromium_args,
        });
        if let Some(proxy) = &options.proxy {
            launch["proxy"] = json!({ "server": proxy });
        }
        let mut config = json!({
            "browser": {
                "browserName": "chromium",
                "isolated": true,
                "launchOptions": launch,
                "contextOptions": {"viewport": {"width": 1280, "height": 720}},
                "initPage": [init_page],
            },
            // No settle time: a snapshot is asked for when it is wanted. No idle time: it would close the browser and
            // go on with a blank one.
            "timeouts": {"settle": 0, "idle": 0},
            // Pages must not add tools: the list of a rollout is fixed.
            "webmcp": false,
        });
        if shared {
            config["server"] = json!({"port": 1});
        }
        config
    }
}

/// The socket of the shared server whose folder is `dir`.
pub(super) fn socket(dir: &Path) -> PathBuf {
    dir.join(SOCKET_FILE)
}

fn text(path: &Path) -> io::Result<String> {
    let text = path
        .to_str()
        .ok_or_else(|| io::Error::other(format!("the path {} is not UTF-8", path.display())))?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_fix() {
        let options = PlaywrightOptions::default();
        let nothing = BTreeMap::from([("PATH".to_owned(), "/nowhere".to_owned())]);
        let error = Installation::find(&options, None, &nothing).unwrap_err();
        assert!(
            error.contains("node") && error.contains("make setup"),
            "{error}"
        );

        let programs = PlaywrightOptions {
            node: Some("/bin/sh".into()),
            ..PlaywrightOptions::default()
        };
        let error = Installation::find(&programs, None, &nothing).unwrap_err();
        assert!(
            error.contains("chromium") && error.contains("make setup"),
            "{error}"
        );

        let programs = PlaywrightOptions {
            chromium: Some("/no/browser".into()),
            ..programs
        };
        let error = Installation::find(&programs, None, &nothing).unwrap_err();
        assert!(error.contains("/no/browser"), "{error}");

        let programs = PlaywrightOptions {
            chromium: Some("/bin/sh".into()),
            playwright_dir: Some("/nowhere".into()),
            ..programs
        };
        let error = Installation::find(&programs, None, &nothing).unwrap_err();
        assert!(
            error.contains("/nowhere") && error.contains("npm ci"),
            "{error}"
        );
    }

    #[test]
    fn a_socket_path_that_is_too_long_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(100));
        let installation = Installation {
            node: "/bin/sh".into(),
            cli: "/cli.js".into(),
            chromium: "/bin/sh".into(),
            version: "1".into(),
        };
        let options = PlaywrightOptions::default();
        let error = installation
            .prepare(&options, &long, true, &BTreeMap::new())
            .err()
            .unwrap();
        assert!(
            error.to_string().contains("shorter temporary folder"),
            "{error}"
        );
        assert!(
            installation
                .prepare(&options, &long, false, &BTreeMap::new())
                .is_ok()
        );
    }
}
