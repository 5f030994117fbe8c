use std::io::Write;

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    listen: String,
    lease_ttl_s: u64,
    labels: Vec<String>,
    api_key: Option<Secret>,
    model: Model,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".to_owned(),
            lease_ttl_s: 60,
            labels: Vec::new(),
            api_key: None,
            model: Model::default(),
        }
    }
}

#[derive(Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct Model {
    base_url: String,
    temperature: Option<f64>,
    auth: Option<Secret>,
}

fn env(pairs: &[(&str, &str)]) -> Environment {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn load_both(text: &str, pairs: &[(&str, &str)]) -> Result<Settings, ConfigError> {
    load(Some(file(text).path()), ENV_PREFIX, &env(pairs))
}

fn refusal(text: &str, pairs: &[(&str, &str)]) -> String {
    load_both(text, pairs).unwrap_err().to_string()
}

#[test]
fn defaults_file_and_environment_in_that_order() {
    let settings = load_both(
        "lease_ttl_s = 30\n[model]\nbase_url = \"http://a\"\n",
        &[
            ("ESPALIER_MODEL__BASE_URL", "http://b"),
            ("ESPALIER_MODEL__TEMPERATURE", "0.5"),
            ("ESPALIER_LABELS", r#"["x", "y"]"#),
            ("HOME", "/nowhere"),
        ],
    )
    .unwrap();
    assert_eq!(settings.listen, "127.0.0.1:0");
    assert_eq!(settings.lease_ttl_s, 30);
    assert_eq!(settings.model.base_url, "http://b");
    assert_eq!(settings.model.temperature, Some(0.5));
    assert_eq!(settings.labels, ["x", "y"]);
    assert_eq!(
        load::<Settings>(None, ENV_PREFIX, &env(&[])).unwrap(),
        Settings::default()
    );
}

#[test]
fn text_that_looks_like_a_number_fits_a_text_key() {
    let settings = load_both(
        "",
        &[
            ("ESPALIER_LISTEN", "8080"),
            ("ESPALIER_API_KEY", "12345"),
            ("ESPALIER_MODEL__BASE_URL", "true"),
        ],
    )
    .unwrap();
    assert_eq!(settings.listen, "8080");
    assert_eq!(settings.api_key, Some(Secret::new("12345")));
    assert_eq!(settings.model.base_url, "true");
}

#[test]
fn a_value_cannot_smuggle_in_keys() {
    let settings = load_both("", &[("ESPALIER_LISTEN", "1\nlease_ttl_s = 9")]).unwrap();
    assert_eq!(settings.listen, "1\nlease_ttl_s = 9");
    assert_eq!(settings.lease_ttl_s, 60);
}

#[test]
fn unknown_keys_are_refused_with_path_value_and_what_is_known() {
    let error = refusal("[model]\nbase_urk = \"http://a\"\n", &[]);
    for part in [
        "`model.base_urk` is not known",
        "`base_url`",
        "got `\"http://a\"`",
        "from file ",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let error = refusal("", &[("ESPALIER_LEASE_TTL", "5")]);
    for part in [
        "`lease_ttl` is not known",
        "`lease_ttl_s`",
        "variable ESPALIER_LEASE_TTL",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let error = refusal("", &[("ESPALIER_MODLE__BASE_URL", "x")]);
    assert!(error.contains("`modle` is not known"), "{error}");
}

#[test]
fn variables_that_are_not_utf8_are_refused_only_if_they_are_ours() {
    use std::os::unix::ffi::OsStringExt;
    let read = |name: &str| {
        let broken = OsString::from_vec(vec![0xff]);
        readable([(name.into(), broken), ("HOME".into(), "/h".into())].into_iter())
    };
    assert_eq!(read("OTHER").unwrap(), env(&[("HOME", "/h")]));
    let error = read("ESPALIER_LISTEN").unwrap_err().to_string();
    assert!(error.contains("`ESPALIER_LISTEN` must be UTF-8"), "{error}");
}

#[test]
fn the_variable_that_names_the_file_is_no_key_and_other_processes_variables_are_none() {
    load_both("", &[("ESPALIER_CONFIG", "x")]).unwrap();
    let others = env(&[("ESPALIER_TOKEN", "x"), ("ESPALIER_UP_SLOTS", "x")]);
    load::<Settings>(None, "ESPALIER_OTHER_", &others).unwrap();
}

#[test]
fn a_wrong_type_names_the_key_and_its_origin() {
    let error = refusal("lease_ttl_s = \"soon\"\n", &[]);
    assert!(error.contains("`lease_ttl_s` is refused"), "{error}");
    assert!(error.contains("soon"), "{error}");
    let error = refusal("", &[("ESPALIER_LEASE_TTL_S", "-1")]);
    assert!(error.contains("variable ESPALIER_LEASE_TTL_S"), "{error}");
}

#[test]
fn a_missing_key_is_named_with_the_places_where_it_can_be_set() {
    #[derive(Debug, Deserialize)]
    struct Needs {
        #[serde(rename = "store_url")]
        _store_url: String,
        #[serde(default, rename = "tokens")]
        _tokens: Vec<Token>,
    }
    #[derive(Debug, Deserialize)]
    struct Token {
        #[serde(rename = "name")]
        _name: String,
    }
    let error = load::<Needs>(None, "ESPALIER_UP_", &env(&[])).unwrap_err();
    let places = "a configuration file, or in environment variable ESPALIER_UP_STORE_URL";
    let said = format!("`store_url` is missing: set it in {places}");
    assert_eq!(error.to_string(), said);
    let file = file("store_url = \"s3://b\"\ntokens = [{}]\n");
    let error = load::<Needs>(Some(file.path()), "ESPALIER_UP_", &env(&[])).unwrap_err();
    let said = format!(
        "`tokens[0].name` is missing: set it in file {}",
        file.path().display()
    );
    assert_eq!(error.to_string(), said);
}

#[test]
fn variables_that_can_mean_no_key_are_refused() {
    for name in [
        "ESPALIER_",
        "ESPALIER_a",
        "ESPALIER_MODEL__",
        "ESPALIER___X",
    ] {
        let error = refusal("", &[(name, "1")]);
        assert!(error.contains(name), "{error}");
    }
    let error = refusal(
        "",
        &[("ESPALIER_LISTEN__PORT", "1"), ("ESPALIER_LISTEN", "x")],
    );
    assert!(error.contains("`listen`"), "{error}");
}

#[test]
fn broken_toml_names_line_and_column_without_quoting_the_line() {
    let error = refusal("a = 1\napi_key = \"sk-12", &[]);
    assert!(error.contains("line 2, column"), "{error}");
    assert!(!error.contains("sk-12"), "{error}");
    let missing = load::<Settings>(
        Some(Path::new("/nonexistent/e.toml")),
        ENV_PREFIX,
        &env(&[]),
    );
    assert!(
        missing
            .unwrap_err()
            .to_string()
            .contains("/nonexistent/e.toml")
    );
}

#[test]
fn secrets_come_from_text_file_or_environment() {
    let key = file("from-file\n");
    let settings = load_both(
        &format!(
            "api_key = {{ file = {:?} }}\n[model]\nauth = {{ env = \"MODEL_KEY\" }}",
            key.path()
        ),
        &[("MODEL_KEY", "from-env")],
    )
    .unwrap();
    assert_eq!(settings.api_key.unwrap().expose(), "from-file");
    assert_eq!(settings.model.auth.unwrap().expose(), "from-env");

    for (text, part) in [
        ("api_key = { env = \"NOT_SET\" }", "`api_key`"),
        ("api_key = { file = \"/nonexistent/key\" }", "`api_key`"),
        ("api_key = \"\"", "`api_key`"),
        ("api_key = { vault = \"x\" }", "`api_key`"),
    ] {
        let error = refusal(text, &[]);
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn secrets_do_not_show() {
    let settings = load_both("api_key = \"sk-hidden\"", &[]).unwrap();
    let shown = format!("{settings:?} {}", settings.api_key.as_ref().unwrap());
    let dumped = toml::to_string(&settings).unwrap();
    for text in [shown, dumped] {
        assert!(!text.contains("sk-hidden"), "{text}");
        assert!(text.contains("[redacted]"), "{text}");
    }
    let error = refusal("api_key = [\"sk-hidden\"]", &[]);
    assert!(!error.contains("sk-hidden"), "{error}");
    let error = refusal("apikey = \"sk-hidden\"", &[]);
    assert!(!error.contains("sk-hidden"), "{error}");
}

#[test]
fn an_environment_reference_outside_a_configuration_is_refused() {
    let error = serde_json::from_str::<Secret>(r#"{"env": "HOME"}"#).unwrap_err();
    assert!(error.to_string().contains("configuration only"), "{error}");
}

#[test]
fn variables_stand_in_texts() {
    let environment = Environment::from([("POD".to_owned(), "a1".to_owned())]);
    let expanded = |text| expand(text, &environment);
    assert_eq!(
        expanded("https://${POD}-8000.x/${POD}"),
        Ok("https://a1-8000.x/a1".to_owned())
    );
    assert_eq!(expanded("$POD ${POD"), Ok("$POD ${POD".to_owned()));
    assert_eq!(expanded("${POD}${NOPE}"), Err("NOPE".to_owned()));
}
