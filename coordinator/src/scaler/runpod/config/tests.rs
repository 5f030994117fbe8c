use super::*;

const GOOD: &str = r#"
    api_key = "rpa_of-a-test"
    max_per_hour = 5.0
    max_per_day = 40.0
    [[pools]]
    name = "train"
    kinds = ["train"]
    max = 2
    image = "registry.example/espalier/train-worker:0.1.0"
    gpus = ["NVIDIA RTX A5000", "NVIDIA L4"]
"#;

fn read(text: &str) -> Result<RunpodConfig, String> {
    let config: RunpodConfig = toml::from_str(text).map_err(|error| error.to_string())?;
    config.validate().map_err(|error| error.to_string())?;
    Ok(config)
}

#[test]
fn a_pod_has_what_its_pool_says_and_whose_it_is() {
    let more = r#"
        gpu_count = 2
        cloud = "community"
        data_centers = ["EU-RO-1"]
        cuda_min = "12.8"
        args = "--device auto"
        disk_gb = 40
        network_volume = { id = "vol1", path = "/models" }
        ports = ["8000/http"]
        registry = "cred1"
        ssh = true
        env = { TOKEN = "hunter2hunter2" }
    "#;
    let config = read(&format!("{GOOD}{more}")).unwrap();
    assert_eq!(
        (config.name.as_str(), config.url.as_str()),
        ("espalier", URL_DEFAULT)
    );
    let pool = config.pool("train").unwrap();
    assert_eq!((pool.jobs_per_worker, pool.min, pool.idle_s), (1, 0, 300));
    let pod = pool.pod(&config.name, "espalier-train-0", "NVIDIA L4");
    assert!(!format!("{pod:?}{config:?}").contains("hunter2"));
    assert!(!format!("{config:?}").contains("rpa_of"));
    assert_eq!(
        serde_json::to_value(&pod).unwrap(),
        serde_json::json!({
            "name": "espalier-train-0",
            "image": "registry.example/espalier/train-worker:0.1.0",
            "args": "--device auto", "disk": 40, "ports": ["8000/http"], "registry": "cred1",
            "env": {
                "ESPALIER_INSTANCE": "espalier-train-0", "ESPALIER_POOL": "train",
                "ESPALIER_SCALER": "espalier", "TOKEN": "hunter2hunter2",
            },
            "cloud": "COMMUNITY", "dataCenterIds": ["EU-RO-1"],
            "gpu": {"id": "NVIDIA L4", "count": 2, "minCudaVersion": "12.8"},
            "mounts": {"network": [{"volumeId": "vol1", "path": "/models"}]},
            "startSsh": true,
        })
    );
}

#[test]
fn what_breaks_a_rule_is_named() {
    for (from, to, expected) in [
        (
            "max_per_hour = 5.0",
            "max_per_hour = 0.0",
            "`max_per_hour` must be above 0",
        ),
        (
            "max_per_hour = 5.0",
            "max_per_hour = nan",
            "`max_per_hour` must be above 0",
        ),
        ("max_per_day = 40.0", "", "max_per_day"),
        (
            "max_per_day = 40.0",
            "max_per_day = 40.0\nname = \"A b\"",
            "`name` must be 1 to 32",
        ),
        (
            "max_per_day = 40.0",
            "max_per_day = 40.0\nurl = \"http://api.runpod.io\"",
            "`url` must be `https://…`",
        ),
        (
            "max_per_day = 40.0",
            "max_per_day = 40.0\nurl = \"https://me:secret@api.runpod.io\"",
            "`url` must be `https://…`",
        ),
        (
            "max = 2",
            "max = 2\ngpu = \"NVIDIA L4\"",
            "unknown field `gpu`",
        ),
        (
            "name = \"train\"",
            "name = \"-\"",
            "`pools[0].name` must be 1 to 32",
        ),
        (
            "image = \"registry.example/espalier/train-worker:0.1.0\"",
            "",
            "`pools[0].image` must be given",
        ),
        (
            "train-worker:0.1.0",
            "train worker",
            "`pools[0].image` must be one word",
        ),
        (
            "\"NVIDIA RTX A5000\", \"NVIDIA L4\"",
            "",
            "`pools[0].gpus` must have at least one",
        ),
        (
            "\"NVIDIA RTX A5000\"",
            "\"NVIDIA L4\"",
            "`pools[0].gpus[1]` must be unique",
        ),
        (
            "max = 2",
            "max = 2\ngpu_count = 0",
            "`pools[0].gpu_count` must be in 1..=16",
        ),
        (
            "max = 2",
            "max = 2\ncuda_min = \"12\"",
            "`pools[0].cuda_min` must be such as",
        ),
        (
            "max = 2",
            "max = 2\nmax_price = -1.0",
            "`pools[0].max_price` must be above 0",
        ),
        (
            "max = 2",
            "max = 2\nports = [\"8000\"]",
            "`pools[0].ports[0]` must be such as",
        ),
        (
            "max = 2",
            "max = 2\nports = [\"0/tcp\"]",
            "`pools[0].ports[0]` must be such as",
        ),
        (
            "max = 2",
            "max = 2\nvolume = { size_gb = 5, path = \"/w\" }",
            "`pools[0].volume.size_gb` must be in 10..=",
        ),
        (
            "max = 2",
            "max = 2\nvolume = { size_gb = 10, path = \"w\" }",
            "`pools[0].volume.path` must be an absolute",
        ),
        (
            "max = 2",
            "max = 2\nvolume = { size_gb = 10, path = \"/w\" }\nnetwork_volume = { id = \"v\", path = \"/n\" }",
            "`pools[0].network_volume` must not be given beside `volume`",
        ),
        (
            "max = 2",
            "max = 2\nenv = { \"A B\" = \"x\" }",
            "`pools[0].env` must have names",
        ),
        (
            "max = 2",
            "max = 2\nenv = { ESPALIER_POOL = \"x\" }",
            "must not set what the scaler sets",
        ),
        (
            "max = 2",
            "max = 2\nenv = { A = \"\" }",
            "must not be empty",
        ),
        (
            "max = 2",
            "max = 2\ncloud = \"SECURE\"",
            "unknown variant `SECURE`",
        ),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let error = read(&GOOD.replace(from, to)).unwrap_err();
        assert!(error.contains(expected), "{to}: {error}");
        assert!(!error.contains("secret@"), "{error}");
    }
    let (_, pool) = GOOD.split_once("[[pools]]").unwrap();
    let error = read(&format!("{GOOD}[[pools]]{pool}")).unwrap_err();
    assert!(
        error.contains("`pools[1].name` must be unique, got `train`"),
        "{error}"
    );
}

#[test]
fn a_worker_that_would_never_connect_is_refused() {
    for (worker, ca) in [
        ("AGENT", "TLS__CA"),
        ("INFER", "COORDINATOR_CA"),
        ("TRAIN", "COORDINATOR_CA"),
    ] {
        let name = |key: &str| format!("ESPALIER_{worker}_WORKER_{key}");
        let mut pool = RunpodPool::new("p", Some("i".to_owned()), vec!["NVIDIA L4".to_owned()]);
        let url = Secret::new("https://jobs.example:7411");
        pool.env.insert(name("COORDINATOR_URL"), url);
        let refused = pool.validate_pod().unwrap_err();
        assert_eq!(refused.field, format!("env.{}", name(ca)), "{refused}");
        pool.template = Some("t".to_owned());
        pool.validate_pod().unwrap();
        pool.template = None;
        let bundle = Secret::new("/etc/ssl/certs/ca-certificates.crt");
        pool.env.insert(name(ca), bundle);
        pool.validate_pod().unwrap();
    }
}
