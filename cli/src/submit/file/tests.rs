//! Reading files of jobs, good and bad.

use std::io::Write;

use super::*;

fn read(
    name: &str,
    content: &[u8],
    additions: Additions,
) -> Result<(Vec<Chunk>, Vec<Refusal>), FieldError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    File::create(&path).unwrap().write_all(content).unwrap();
    let (mut chunks, mut refusals) = (Vec::new(), Vec::new());
    JobFile::open(&path, additions)?
        .read_all(|piece| {
            match piece {
                Piece::Chunk(chunk) => chunks.push(chunk),
                Piece::Refused(refusal) => refusals.push(refusal),
                Piece::Progress(_) => {}
            }
            true
        })
        .unwrap();
    Ok((chunks, refusals))
}

fn jsonl(content: &[u8], additions: Additions) -> (Vec<Chunk>, Vec<Refusal>) {
    read("jobs.jsonl", content, additions).unwrap()
}

#[test]
fn a_bad_line_is_refused_and_the_rest_goes_on() {
    let content = b"{\"id\":\"a\",\"prompt\":\"x\"}\n\n{\"promt\":\"x\"}\n{\"prompt\":\"\xff\"}\n[1]\n{\"id\":\"a\",\"prompt\":\"y\"}\n{\"id\":\"b\",\"prompt\":\"${site}\"}\n{\"id\":\"c\",\"prompt\":\"z\"}";
    let (chunks, refusals) = jsonl(content, Additions::default());
    assert_eq!(chunks.len(), 1);
    assert_eq!(chunks[0].places, [1, 8]);
    let found: Vec<(u64, &str, &str)> = refusals
        .iter()
        .map(|r| (r.place, r.error.field.as_str(), r.error.rule.as_str()))
        .collect();
    let expected = [
        (3, "promt", "is no known key; did you mean `prompt`?"),
        (4, "line", "must be UTF-8"),
        (5, "line", "must be a JSON object"),
        (
            6,
            "id",
            "must be unique in the file, and entry 1 has it too",
        ),
        (
            7,
            "prompt",
            "must use variables of --var only (none is given)",
        ),
    ];
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!((found.0, found.1), (expected.0, expected.1));
        assert!(found.2.starts_with(expected.2), "{}", found.2);
    }
    assert_eq!(refusals[3].id, "a");
}

#[test]
fn a_line_of_ten_megabytes_is_refused_with_its_size() {
    let mut content = b"{\"prompt\":\"".to_vec();
    content.resize(10_000_000, b'x');
    content.extend_from_slice(b"\"}\n{\"prompt\":\"y\"}\n");
    let (chunks, refusals) = jsonl(&content, Additions::default());
    assert_eq!(chunks[0].places, [2]);
    assert_eq!(
        refusals[0].error.rule,
        "must have at most 4194304 bytes, has 10000002"
    );
}

#[test]
fn a_spec_above_the_limit_is_refused_with_its_size() {
    let line = format!("{{\"prompt\":\"{}\"}}", "x".repeat(limits::SPEC_BYTES_MAX));
    let (chunks, refusals) = jsonl(line.as_bytes(), Additions::default());
    assert!(chunks.is_empty());
    assert_eq!(
        refusals[0].error.rule,
        "must have at most 1048576 bytes as a spec"
    );
}

#[test]
fn samples_share_a_group() {
    let additions = Additions {
        samples: Some(3),
        labels: BTreeMap::from([("run".to_owned(), "7".to_owned())]),
        ..Additions::default()
    };
    let (chunks, _) = jsonl(
        b"{\"id\":\"a\",\"task_id\":\"t\",\"prompt\":\"x\"}\n",
        additions,
    );
    let ids: Vec<&str> = chunks[0]
        .jobs
        .iter()
        .filter_map(|job| job.id.as_deref())
        .collect();
    assert_eq!(ids, ["a.s0", "a.s1", "a.s2"]);
    let last = chunks[0].jobs[2].rollout.clone().unwrap();
    assert_eq!(
        (last.group.as_deref(), last.sample_index),
        (Some("t"), Some(2))
    );
    assert_eq!(chunks[0].jobs[0].labels["run"], "7");
}

#[test]
fn chunks_keep_to_both_limits() {
    let small = "{\"prompt\":\"x\"}\n".repeat(CHUNK_JOBS_MAX + 1);
    let (chunks, _) = jsonl(small.as_bytes(), Additions::default());
    let sizes: Vec<(u32, usize)> = chunks.iter().map(|c| (c.number, c.jobs.len())).collect();
    assert_eq!(sizes, [(0, CHUNK_JOBS_MAX), (1, 1)]);

    let big = format!("{{\"prompt\":\"{}\"}}\n", "x".repeat(200 * 1024)).repeat(60);
    let (chunks, _) = jsonl(big.as_bytes(), Additions::default());
    assert_eq!(chunks.iter().map(|c| c.jobs.len()).sum::<usize>(), 60);
    assert!(chunks.len() > 1);
    for chunk in chunks {
        let bytes: usize = chunk.jobs.iter().map(Message::encoded_len).sum();
        assert!(bytes <= CHUNK_BYTES_MAX, "{bytes}");
    }
}

#[test]
fn a_toml_file_has_defaults_and_keeps_its_good_jobs() {
    let content = b"[defaults]\nmcp = [\"browser\"]\nprompt = \"at ${site}\"\n[[jobs]]\nid = \"a\"\n[[jobs]]\nprompts = 1\n[[jobs]]\nid = \"b\"\n";
    let vars = Vars::from([("site".to_owned(), "http://h".to_owned())]);
    let additions = Additions {
        vars,
        ..Additions::default()
    };
    let (chunks, refusals) = read("jobs.toml", content, additions).unwrap();
    assert_eq!(chunks[0].places, [1, 3]);
    assert_eq!(
        (refusals[0].place, refusals[0].error.field.as_str()),
        (2, "prompts")
    );
}

#[test]
fn a_file_that_is_none_is_refused_as_a_whole() {
    assert!(read("jobs.toml", b"[jobs", Additions::default()).is_err());
    let error = read("jobs.toml", b"[default]\n", Additions::default()).unwrap_err();
    assert_eq!(error.field, "default");
    assert!(JobFile::open(Path::new("/nowhere/x.jsonl"), Additions::default()).is_err());
}
