use super::*;

async fn source(name: &str) -> Option<Source> {
    Source::parse(name, None).await.ok()
}

#[tokio::test]
async fn a_name_means_one_place() {
    let hub = |repo: &str, revision: &str| Source::Hub {
        repo: repo.parse().unwrap(),
        revision: revision.to_owned(),
    };
    assert_eq!(
        source("Qwen/Qwen3-0.6B").await,
        Some(hub("Qwen/Qwen3-0.6B", "main"))
    );
    assert_eq!(
        Source::parse("a/b", Some("refs/pr/1")).await.ok(),
        Some(hub("a/b", "refs/pr/1"))
    );
    let url = "s3://b/p".to_owned();
    assert_eq!(source("s3://b/p/").await, Some(Source::Bucket { url }));
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().display().to_string();
    assert_eq!(
        source(&path).await,
        Some(Source::Folder(folder.path().to_owned()))
    );
    for wrong in [
        "",
        "x",
        "/no/such/folder",
        "a/b/c",
        "a/..",
        "../b",
        "a/b c",
        "https://x/y",
    ] {
        assert_eq!(source(wrong).await, None, "{wrong}");
    }
    assert!(Source::parse("a/b", Some("../x")).await.is_err());
}

#[test]
fn an_index_leads_nowhere_else() {
    let index = |files: &[&str]| {
        let map: serde_json::Map<_, _> = files
            .iter()
            .enumerate()
            .map(|(i, file)| (format!("t{i}"), serde_json::json!(file)))
            .collect();
        shards(&serde_json::json!({"weight_map": map}).to_string())
    };
    let (a, b) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    assert_eq!(index(&[b, a, b]).unwrap(), [a, b]);
    for wrong in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "x.bin",
        ".safetensors",
        "",
    ] {
        let rule = index(&[wrong]).unwrap_err();
        assert!(
            rule.starts_with("must name files of its own folder"),
            "{wrong}: {rule}"
        );
    }
    assert!(index(&[]).unwrap_err().contains("1 to 1000 files, got 0"));
    assert!(shards("[]").unwrap_err().starts_with("is no index"));
}
