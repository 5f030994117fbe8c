//! The hub's client against a stand-in: files out and in, and everything that the hub does wrong.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_runtime::config::Secret;
use espalier_runtime::hub::{
    Change, Commit, Content, Hub, HubError, HubSettings, MAIN, Meter, Refusal, Repo, RepoKind,
    RepoState, Upload,
};
use espalier_testbed::hub::{Fault, Hub as StandIn, Trouble};
use tempfile::TempDir;

const TOKEN: &str = "hf_s3cret";
const REPO: &str = "me/shop";
/// Goes to the storage, by its name.
const LARGE: &str = "adapter_model.safetensors";

struct World {
    stand_in: StandIn,
    hub: Hub,
    cache: TempDir,
}

impl World {
    async fn new() -> Self {
        let stand_in = StandIn::empty().await;
        let cache = TempDir::new().unwrap();
        let hub = hub(&stand_in, &cache, Some(TOKEN));
        Self {
            stand_in,
            hub,
            cache,
        }
    }

    async fn create(&self) -> RepoState {
        self.hub.create_repo(&repo(), true).await.unwrap()
    }

    async fn commit(&self, files: Vec<Upload>) -> Result<Commit, HubError> {
        let meter = Arc::new(Meter::default());
        self.hub.commit(&repo(), MAIN, change(files), &meter).await
    }
}

fn hub(stand_in: &StandIn, cache: &TempDir, token: Option<&str>) -> Hub {
    let hub = Hub::new(HubSettings {
        endpoint: stand_in.url.clone(),
        token: token.map(Secret::new),
        ca: None,
        cache: Some(cache.path().to_owned()),
        offline: false,
    })
    .unwrap();
    hub.with_first_wait(Duration::from_millis(1))
}

fn repo() -> Repo {
    REPO.parse().unwrap()
}

fn file(path: &str, content: &[u8]) -> Upload {
    Upload {
        path: path.to_owned(),
        content: Content::Bytes(content.to_vec().into()),
    }
}

fn files() -> Vec<Upload> {
    vec![
        file("README.md", b"# shop"),
        file(LARGE, &[7; 5_000]),
        file("empty", b""),
    ]
}

fn change(files: Vec<Upload>) -> Change {
    Change {
        files,
        folder: None,
        message: "Add shop v1\n\nFrom a job.".to_owned(),
    }
}

fn refusal(error: &HubError) -> Refusal {
    match error {
        HubError::Refused { refusal, .. } => *refusal,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn files_get_into_a_private_repository_with_one_commit_and_not_twice() {
    let world = World::new().await;
    let state = world.create().await;
    assert_eq!((state.is_new, state.is_private), (true, true));
    assert_eq!(world.stand_in.is_private(REPO), Some(true));
    let (meter, repo) = (Arc::new(Meter::default()), repo());
    let commit = world.hub.commit(&repo, MAIN, change(files()), &meter);
    let commit = commit.await.unwrap();
    assert!(commit.made);
    assert_eq!(
        (meter.total(), meter.done()),
        (5_000, 5_000),
        "what goes to the storage"
    );
    let made = world.stand_in.commits(REPO);
    assert_eq!((made.len(), &made[0].id), (1, &commit.id));
    assert_eq!(made[0].summary, "Add shop v1");
    assert_eq!(made[0].description, "From a job.");
    let there = world.stand_in.files(REPO).unwrap();
    assert_eq!(there[LARGE], [7; 5_000]);
    assert_eq!(
        (&there["README.md"][..], &there["empty"][..]),
        (&b"# shop"[..], &b""[..])
    );

    let again = world.commit(files()).await.unwrap();
    assert_eq!(
        again,
        Commit {
            id: commit.id,
            made: false
        }
    );
    assert_eq!(world.stand_in.count("PUT /storage"), 1);
    // Of a change only what is new is sent.
    let mut changed = files();
    changed[0] = file("README.md", b"# shop, better");
    assert!(world.commit(changed).await.unwrap().made);
    assert_eq!(world.stand_in.count("PUT /storage"), 1);
    assert_eq!(
        world.stand_in.files(REPO).unwrap()["README.md"],
        b"# shop, better"
    );

    let state = world.create().await;
    assert_eq!(
        (state.is_new, state.is_private),
        (false, true),
        "409: it is there"
    );
    // The stand-in's storage refuses whoever shows it a token; the hub saw it each time.
    for seen in world.stand_in.seen() {
        let shown = seen.token.as_deref() == Some(TOKEN);
        assert_eq!(shown, !seen.what.contains("/storage"), "{}", seen.what);
    }
}

#[tokio::test]
async fn a_large_file_goes_in_parts_where_the_hub_says_so() {
    let world = World::new().await;
    world.create().await;
    world.stand_in.parts_of(1_000);
    let content: Vec<u8> = (0..12_345_u32).map(|i| (i / 10) as u8).collect();
    let path = world.cache.path().join("weights");
    std::fs::write(&path, &content).unwrap();
    world.stand_in.trouble("PUT /storage", Trouble::Cut, 2);
    let upload = Upload {
        path: LARGE.to_owned(),
        content: Content::File(path),
    };
    world.commit(vec![upload]).await.unwrap();
    assert_eq!(world.stand_in.files(REPO).unwrap()[LARGE], content);
    assert_eq!(
        world.stand_in.count("PUT /storage"),
        13 + 2,
        "only what was cut is sent again"
    );
}

#[tokio::test]
async fn what_passes_is_tried_again() {
    let world = World::new().await;
    for (text, trouble) in [
        ("repos/create", Trouble::Status(429, Some(0))),
        ("preupload", Trouble::Status(503, None)),
        ("objects/batch", Trouble::Status(500, None)),
        ("PUT /storage", Trouble::Cut),
        ("objects/verify", Trouble::Status(504, None)),
        ("/commit/", Trouble::Status(409, None)),
        ("/commit/", Trouble::Status(429, Some(0))),
        ("/commit/", Trouble::Cut),
    ] {
        world.stand_in.trouble(text, trouble, 1);
    }
    world.create().await;
    assert!(world.commit(files()).await.unwrap().made);
    assert_eq!(world.stand_in.commits(REPO).len(), 1);
    assert_eq!(world.stand_in.count("/commit/"), 4);
}

#[tokio::test]
async fn of_a_folder_only_what_is_new_stays_and_the_rest_of_the_repository_as_it_was() {
    let world = World::new().await;
    let repo = Repo::new(RepoKind::Dataset, REPO).unwrap();
    world.hub.create_repo(&repo, false).await.unwrap();
    let commit = |names: &[&str]| {
        let change = Change {
            files: names.iter().map(|name| file(name, b"rows")).collect(),
            folder: Some("data"),
            message: "rows".to_owned(),
        };
        let (hub, repo) = (world.hub.clone(), repo.clone());
        async move {
            hub.commit(&repo, MAIN, change, &Arc::default())
                .await
                .unwrap()
        }
    };
    let names = || {
        let files = world.stand_in.files("datasets/me/shop").unwrap();
        files.into_keys().collect::<Vec<_>>()
    };
    commit(&["data/a.parquet", "data/b.parquet", "data2/x", "README.md"]).await;
    assert!(commit(&["data/a.parquet", "data/c.parquet"]).await.made);
    assert_eq!(
        names(),
        ["README.md", "data/a.parquet", "data/c.parquet", "data2/x"]
    );
    // A commit that only takes away is one too; again there is nothing to do.
    assert!(commit(&["data/a.parquet"]).await.made);
    assert!(!commit(&["data/a.parquet"]).await.made);
    assert_eq!(names(), ["README.md", "data/a.parquet", "data2/x"]);
    assert_eq!(world.stand_in.commits("datasets/me/shop").len(), 3);
}

#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_found_and_not_made_again() {
    let world = World::new().await;
    world.create().await;
    world.stand_in.trouble("/commit/", Trouble::CutAfter, 1);
    let commit = world.commit(files()).await.unwrap();
    let made = world.stand_in.commits(REPO);
    assert_eq!((made.len(), &made[0].id), (1, &commit.id));
    assert!(commit.made);
}

#[tokio::test]
async fn the_hub_is_waited_for_as_long_as_it_asks() {
    let world = World::new().await;
    world
        .stand_in
        .trouble("repos/create", Trouble::Status(429, Some(1)), 1);
    let began = Instant::now();
    world.create().await;
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn refusals_are_told_apart_and_show_no_token() {
    let world = World::new().await;
    let missing = world.commit(files()).await.unwrap_err();
    assert_eq!(refusal(&missing), Refusal::Missing);
    world.create().await;
    let none = hub(&world.stand_in, &world.cache, None);
    let nobody = none
        .create_repo(&"me/other".parse().unwrap(), true)
        .await
        .unwrap_err();
    assert_eq!(refusal(&nobody), Refusal::Token);
    assert!(nobody.to_string().contains("set HF_TOKEN"), "{nobody}");
    world.stand_in.writer("hf_another");
    let forbidden = world.commit(files()).await.unwrap_err();
    assert_eq!(refusal(&forbidden), Refusal::Forbidden);
    // Who may not make repositories may still write to one that is there.
    assert!(!world.hub.create_repo(&repo(), true).await.unwrap().is_new);
    world.stand_in.writer(TOKEN);
    world
        .stand_in
        .trouble("preupload", Trouble::Status(500, None), usize::MAX);
    let busy = world.commit(files()).await.unwrap_err();
    assert_eq!(refusal(&busy), Refusal::Busy);
    assert_eq!(world.stand_in.count("preupload"), 1 + 1 + 5);
    for error in [missing, nobody, forbidden, busy] {
        assert!(!format!("{error:?} {error}").contains(TOKEN), "{error:?}");
    }
    assert!(world.stand_in.commits(REPO).is_empty());
}

#[tokio::test]
async fn names_that_lead_elsewhere_and_too_many_files_are_refused() {
    let world = World::new().await;
    for name in ["", "../x", "a//b", ".git/config", "a/.hidden", "a b"] {
        let error = world.commit(vec![file(name, b"x")]).await.unwrap_err();
        assert!(matches!(error, HubError::Name { .. }), "{name}: {error}");
    }
    let many = (0..1_001).map(|i| file(&format!("f{i}"), b"x")).collect();
    let error = world.commit(many).await.unwrap_err();
    assert!(
        error.to_string().contains("at most 1000, is 1001"),
        "{error}"
    );
    assert!(world.stand_in.seen().is_empty(), "nobody is asked");
    for name in ["shop", "a/b/c", "../b", "a/.b", "a/", "a b/c"] {
        assert!(name.parse::<Repo>().is_err(), "{name}");
    }
}

#[tokio::test]
async fn a_file_comes_into_the_cache_once_and_only_if_it_is_what_was_promised() {
    let world = World::new().await;
    world.create().await;
    world.commit(files()).await.unwrap();
    world.stand_in.fault(LARGE, Fault::Lies);
    let snapshot = world
        .hub
        .snapshot(&repo(), "main", &[], 10_000)
        .await
        .unwrap();
    let error = snapshot.get(LARGE).await.unwrap_err();
    assert!(
        matches!(
            error,
            HubError::Damaged {
                what: "its SHA-256",
                ..
            }
        ),
        "{error}"
    );
    world.stand_in.heal();
    let path = snapshot.get(LARGE).await.unwrap().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [7; 5_000]);
    let asked = world.stand_in.asked().len();
    assert_eq!(snapshot.get(LARGE).await.unwrap(), Some(path));
    assert_eq!(world.stand_in.asked().len(), asked);
    assert_eq!(snapshot.get("other").await.unwrap(), None);
    let small = world.hub.snapshot(&repo(), "main", &[], 3).await.unwrap();
    let error = small.get("README.md").await.unwrap_err();
    assert!(
        error.to_string().contains("must be at most 3, is 6"),
        "{error}"
    );
}

/// One request over TLS, answered with what a repository holds.
fn serve_tls(certified: &rcgen::CertifiedKey<rcgen::KeyPair>, connections: usize) -> SocketAddr {
    let key = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.unwrap())
        .unwrap();
    let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for tcp in listener.incoming().take(connections) {
            let tls = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(tls, tcp.unwrap());
            let mut request = [0; 4_096];
            // A client that trusts nobody here says so and goes.
            if stream.read(&mut request).is_ok_and(|read| read > 0) {
                let body = r#"{"sha":"abc","siblings":[]}"#;
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                let _ = stream.write_all(format!("{head}{body}").as_bytes());
            }
        }
    });
    address
}

#[tokio::test]
async fn a_companys_authority_is_trusted_where_it_is_named() {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = TempDir::new().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, certified.cert.pem()).unwrap();
    let address = serve_tls(&certified, 6);
    let environment = |ca: Option<&Path>| {
        let endpoint = format!("https://localhost:{}/", address.port());
        let ca = ca.map(|ca| ("REQUESTS_CA_BUNDLE".to_owned(), ca.display().to_string()));
        let home = ("HF_HOME".to_owned(), folder.path().display().to_string());
        let all = [("HF_ENDPOINT".to_owned(), endpoint), home]
            .into_iter()
            .chain(ca);
        HubSettings::new(&all.collect())
    };
    let asked = |settings: HubSettings| async move {
        let hub = Hub::new(settings)
            .unwrap()
            .with_first_wait(Duration::from_millis(1));
        let snapshot = hub.snapshot(&repo(), "main", &[], 1).await;
        snapshot.map(|snapshot| snapshot.commit().to_owned())
    };
    let stranger = asked(environment(None)).await.unwrap_err();
    assert!(
        matches!(stranger, HubError::Unreachable { .. }),
        "{stranger}"
    );
    assert_eq!(asked(environment(Some(&ca))).await.unwrap(), "abc");
    std::fs::write(&ca, "no certificate").unwrap();
    let refused = Hub::new(environment(Some(&ca)));
    assert!(matches!(refused, Err(HubError::Ca { .. })), "{refused:?}");
}

#[test]
fn the_token_comes_from_the_environment_or_from_where_a_login_left_it() {
    let home = TempDir::new().unwrap();
    let of = |pairs: &[(&str, &str)]| {
        let pairs = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let home = ("HOME".to_owned(), home.path().display().to_string());
        let settings = HubSettings::new(&pairs.chain([home]).collect());
        assert!(!format!("{settings:?}").contains("hf_"), "{settings:?}");
        settings.token.map(|token| token.expose().to_owned())
    };
    assert_eq!(of(&[]), None);
    let folder = home.path().join(".cache/huggingface");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("token"), "hf_of_login\n").unwrap();
    assert_eq!(of(&[]).as_deref(), Some("hf_of_login"));
    assert_eq!(of(&[("HF_TOKEN", "hf_given")]).as_deref(), Some("hf_given"));
    assert_eq!(of(&[("HF_TOKEN_PATH", "/no/such/file")]), None);
}
