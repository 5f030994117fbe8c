//! The examples of the guide are read as a coordinator reads them.

use std::path::Path;

use espalier_runtime::config::{Environment, load};

use crate::config::{CoordinatorConfig, ENV_PREFIX};

/// What every coordinator has.
const REST: &str = r#"
    data_dir = "/tmp/x"
    store_url = "memory://"
    tokens = [{ name = "ci", sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", project = "shop", roles = ["read"] }]
"#;

#[test]
fn its_configurations_are_accepted() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guides/runpod.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    let examples = guide.split("```toml\n").skip(1);
    let examples: Vec<&str> = examples
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert_eq!(examples.len(), 2, "the guide has other examples");
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "of-a-test").unwrap();
    let environment: Environment = [
        "RUNPOD_API_KEY",
        "POD_ACCESS_KEY_ID",
        "POD_SECRET_ACCESS_KEY",
    ]
    .map(|name| (name.to_owned(), "of-a-test".to_owned()))
    .into();
    for example in examples {
        // The files of secrets are the reader's.
        let lines = example
            .lines()
            .map(|line| match line.split_once("{ file = \"/run/secrets/") {
                Some((before, _)) => format!("{before}{{ file = {secret:?} }}"),
                None => line.to_owned(),
            });
        let file = folder.path().join("coordinator.toml");
        std::fs::write(
            &file,
            format!("{REST}{}", lines.collect::<Vec<_>>().join("\n")),
        )
        .unwrap();
        let config: CoordinatorConfig = load(Some(&file), ENV_PREFIX, &environment).unwrap();
        config.validate().unwrap();
        let scaler = config.scaler.unwrap();
        assert_eq!(scaler.runpod.unwrap().name, "espalier");
    }
}
