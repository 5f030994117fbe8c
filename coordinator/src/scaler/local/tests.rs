use super::*;
use espalier_runtime::clock::SystemClock;
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(20);

fn local(folder: &TempDir, script: &str) -> Local {
    let pool = LocalPool {
        name: "a".to_owned(),
        kinds: [espalier_core::queue::JobKind::Rollout].into(),
        jobs_per_worker: 1,
        min: 0,
        max: 9,
        idle_s: 1,
        start_s: 1,
        grace_s: 1,
        command: ["/bin/sh", "-c", script, "worker"]
            .map(str::to_owned)
            .into(),
        env: [(
            "GIVEN".to_owned(),
            espalier_runtime::config::Secret::new("hunter2 of {instance}"),
        )]
        .into(),
        pass_env: ["PASSED".to_owned()].into(),
    };
    let config = LocalConfig { pools: vec![pool] };
    let environment = ["PATH", "PASSED", "ESPALIER_COORDINATOR_QUEUE"].map(|name| {
        let value = match name {
            "PATH" => "/usr/bin:/bin",
            _ => "of the coordinator",
        };
        (name.to_owned(), value.to_owned())
    });
    let folder = folder.path();
    Local::new(&config, folder, environment.into(), Arc::new(SystemClock))
}

/// Waits until `wanted` finds something in what is listed.
async fn listed<T>(
    local: &Local,
    wanted: impl Fn(&Result<Vec<Instance>, ProviderError>) -> Option<T>,
) -> T {
    let until = Instant::now() + SOON;
    loop {
        let list = local.list().await;
        if let Some(found) = wanted(&list) {
            return found;
        }
        assert!(Instant::now() < until, "{list:?}");
        tokio::time::sleep(END_LOOK).await;
    }
}

async fn written(folder: &TempDir, name: &str) -> String {
    let until = Instant::now() + SOON;
    loop {
        match std::fs::read_to_string(folder.path().join(name)) {
            Ok(text) if text.ends_with('\n') => return text,
            other => assert!(Instant::now() < until, "{other:?}"),
        }
        tokio::time::sleep(END_LOOK).await;
    }
}

fn in_folder(folder: &TempDir, script: &str) -> String {
    format!("cd '{}'; {script}", folder.path().display())
}

#[tokio::test]
async fn a_process_knows_its_instance_and_none_of_the_coordinators_secrets() {
    let folder = TempDir::new().unwrap();
    let script = "{ env; echo {instance}; } > part; mv part e; exec sleep 600";
    let local = local(&folder, &in_folder(&folder, script));
    assert_eq!(local.list().await.unwrap(), []);
    local.create("a", "local-a-0").await.unwrap();
    let instances = local.list().await.unwrap();
    let [instance] = &instances[..] else {
        panic!("{instances:?}");
    };
    let seen = (&*instance.pool, &*instance.name, &instance.state);
    assert_eq!(seen, ("a", "local-a-0", &InstanceState::Running));
    let environment = written(&folder, "e").await;
    for line in [
        "ESPALIER_INSTANCE=local-a-0",
        "GIVEN=hunter2 of local-a-0",
        "local-a-0",
        "PASSED=of the coordinator",
    ] {
        assert!(environment.lines().any(|l| l == line), "{environment}");
    }
    assert!(!environment.contains("QUEUE"), "{environment}");
    local.delete(instance).await.unwrap();
    assert_eq!(local.list().await.unwrap(), []);
    local.delete(instance).await.expect("it is gone already");
}

#[tokio::test]
async fn one_that_ends_as_it_should_is_gone_and_another_has_failed() {
    let folder = TempDir::new().unwrap();
    let script =
        r#"case $ESPALIER_INSTANCE in *-0) exit 0;; *-1) exit 64;; *) kill -s KILL $$;; esac"#;
    let local = local(&folder, script);
    for n in 0..3 {
        local.create("a", &format!("local-a-{n}")).await.unwrap();
    }
    let words = listed(&local, |list| {
        let list = list.as_ref().unwrap();
        let failed = list.iter().map(|i| match &i.state {
            InstanceState::Failed(why) => Some(format!("{} {why}", i.name)),
            _ => None,
        });
        let mut failed: Vec<String> = failed.collect::<Option<_>>()?;
        failed.sort();
        (failed.len() == 2).then_some(failed)
    })
    .await;
    assert!(
        words[0].starts_with("local-a-1 it refused its configuration"),
        "{words:?}"
    );
    assert_eq!(words[1], "local-a-2 it was ended by signal 9");
    for instance in local.list().await.unwrap() {
        local.delete(&instance).await.unwrap();
    }
    assert_eq!(local.list().await.unwrap(), []);
}

#[tokio::test]
async fn a_pool_that_is_not_known_is_refused() {
    let folder = TempDir::new().unwrap();
    let refused = local(&folder, "exit").create("b", "local-b-0").await;
    assert!(matches!(refused, Err(ProviderError::Refused(_))));
}

#[tokio::test]
async fn processes_end_with_their_coordinator_and_the_next_one_starts_none_before() {
    let folder = TempDir::new().unwrap();
    // It does not listen to SIGTERM.
    let script = "trap 'echo told >> told' TERM; echo $$ > pid; while :; do sleep 0.05; done";
    let script = in_folder(&folder, script);
    let first = local(&folder, &script);
    first.list().await.unwrap();
    first.create("a", "local-a-0").await.unwrap();
    let pid = written(&folder, "pid").await;
    let second = local(&folder, &script);
    let early = second.create("a", "local-a-0").await.unwrap_err();
    assert!(early.to_string().contains("earlier coordinator"), "{early}");
    // As the kernel does it for one that was killed.
    drop(first);
    assert_eq!(written(&folder, "told").await, "told\n");
    assert!(second.list().await.is_err(), "it has not ended yet");
    let none = listed(&second, |list| list.as_ref().ok().cloned()).await;
    assert_eq!(none, []);
    assert!(!Path::new("/proc").join(pid.trim()).exists());
    second.close();
    let closed = second.create("a", "local-a-0").await.unwrap_err();
    assert!(closed.to_string().contains("shutting down"), "{closed}");
}

#[tokio::test]
async fn a_worker_whose_keeper_was_killed_is_ended_too() {
    let folder = TempDir::new().unwrap();
    let local = local(
        &folder,
        &in_folder(&folder, "echo $PPID > keeper; echo $$ > pid; sleep 600"),
    );
    local.create("a", "local-a-0").await.unwrap();
    let pid = written(&folder, "pid").await;
    let keeper = written(&folder, "keeper").await.trim().parse().unwrap();
    let keeper = Pid::from_raw(keeper).unwrap();
    rustix::process::kill_process(keeper, Signal::KILL).unwrap();
    listed(&local, |list| {
        let first = list.as_ref().unwrap().first()?;
        matches!(first.state, InstanceState::Failed(_)).then_some(())
    })
    .await;
    let until = Instant::now() + SOON;
    while Path::new("/proc").join(pid.trim()).exists() {
        assert!(Instant::now() < until, "{pid} is left over");
        tokio::time::sleep(END_LOOK).await;
    }
}
