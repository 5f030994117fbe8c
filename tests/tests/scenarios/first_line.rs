//! A process that cannot start says in the first line of its log what to change.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use espalier_tests::harness::process::{Process, binary};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(60);

/// A program, what is wrong with its configuration, and words of its first line.
struct Case {
    program: &'static str,
    options: &'static [&'static str],
    /// Its configuration file.
    file: &'static str,
    variables: &'static [(&'static str, &'static str)],
    says: &'static [&'static str],
}

const TOKENS: (&str, &str) = (
    "ESPALIER_COORDINATOR_TOKENS",
    r#"[{name = "w", sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", project = "*", roles = ["worker"]}]"#,
);
const LISTEN: (&str, &str) = ("ESPALIER_COORDINATOR_LISTEN", "127.0.0.1:0");
const IN_MEMORY: (&str, &str) = ("ESPALIER_COORDINATOR_STORE_URL", "memory://");
const CASES: &[Case] = &[
    // Values.
    Case {
        program: "espalier-coordinator",
        options: &[],
        file: "",
        variables: &[
            TOKENS,
            LISTEN,
            IN_MEMORY,
            ("ESPALIER_COORDINATOR_LEASE_TTL_MS", "5"),
        ],
        says: &["`lease_ttl_ms` must be in 100..=3600000", "5"],
    },
    Case {
        program: "espalier-agent-worker",
        options: &[],
        file: "",
        variables: &[("ESPALIER_AGENT_WORKER_SLOTZ", "8")],
        says: &["ESPALIER_AGENT_WORKER_SLOTZ"],
    },
    // Secrets.
    Case {
        program: "espalier-coordinator",
        options: &[],
        file: "queue = { file = \"/run/secrets/no-such-queue\" }",
        variables: &[TOKENS, LISTEN, IN_MEMORY],
        says: &["`queue`", "/run/secrets/no-such-queue"],
    },
    Case {
        program: "espalier-agent-worker",
        options: &[],
        file: "token = { env = \"NO_SUCH_TOKEN\" }",
        variables: &[],
        says: &["`token`", "`NO_SUCH_TOKEN` is not set"],
    },
    // Addresses.
    Case {
        program: "espalier-coordinator",
        options: &[],
        file: "",
        variables: &[
            TOKENS,
            LISTEN,
            IN_MEMORY,
            (
                "ESPALIER_COORDINATOR_QUEUE",
                "redis://:secret@127.0.0.1:9/0",
            ),
        ],
        says: &[
            "`queue` leads to redis://127.0.0.1:9/0",
            "Connection refused",
        ],
    },
    Case {
        program: "espalier-coordinator",
        options: &[],
        file: "",
        variables: &[
            TOKENS,
            LISTEN,
            ("ESPALIER_COORDINATOR_STORE_URL", "s3:/bucket"),
        ],
        says: &["`store_url`", "must begin with `file://` or `s3://`"],
    },
    Case {
        program: "espalier-agent-worker",
        options: &[],
        file: "",
        variables: &[("ESPALIER_AGENT_WORKER_COORDINATOR_URL", "htp://x")],
        says: &["`coordinator_url`", "htp://x", "must be `http://host:port`"],
    },
    // A GPU. What is to run on it is not fetched before.
    Case {
        program: "espalier-infer-worker",
        options: &["--model", "no-such/model", "--device", "cuda:1000"],
        file: "",
        variables: &[],
        says: &["cuda:1000"],
    },
    Case {
        program: "espalier-train-worker",
        options: &[
            "--coordinator-url",
            "http://127.0.0.1:9",
            "--store-url",
            "memory://",
            "--device",
            "cuda:1000",
        ],
        file: "",
        variables: &[("ESPALIER_TRAIN_WORKER_TOKEN", "of-a-test")],
        says: &["cuda:1000"],
    },
];

/// What each program cannot do without, where the case says nothing else.
fn command(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(binary(program));
    command.env("HOME", folder);
    let data_dir = folder.join("data");
    match program {
        "espalier-coordinator" => command.env("ESPALIER_COORDINATOR_DATA_DIR", data_dir),
        "espalier-agent-worker" => command
            .env("ESPALIER_AGENT_WORKER_DATA_DIR", data_dir)
            .env("ESPALIER_AGENT_WORKER_STORE_URL", "memory://")
            .env(
                "ESPALIER_AGENT_WORKER_COORDINATOR_URL",
                "http://127.0.0.1:9",
            )
            .env("ESPALIER_AGENT_WORKER_MODEL_NAME", "tiny"),
        _ => &mut command,
    };
    command
}

#[tokio::test]
async fn the_first_line_says_what_to_change() {
    let has_driver = Path::new("/dev/nvidiactl").exists();
    for case in CASES {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut command = command(case.program, folder.path());
        if !case.file.is_empty() {
            let file = folder.path().join("config.toml");
            std::fs::write(&file, case.file).expect("the test's folder is writable");
            command.arg("--config").arg(file);
        }
        command.args(case.options);
        command.envs(case.variables.iter().copied());
        let mut process = Process::start(case.program, command, folder.path());
        let status = process.wait(DEADLINE).await;
        let said = process.log();
        let first = said.lines().next().unwrap_or_default();
        assert!(!status.success(), "{} started: {said}", case.program);
        for words in case.says {
            assert!(first.contains(words), "no {words:?} in {said}");
        }
        assert!(!said.contains("secret@"), "a secret is shown: {said}");
        if case.says == ["cuda:1000"] && !has_driver {
            assert!(first.contains("start the container with the GPU"), "{said}");
        }
    }
}
