//! `espalier top`: one frame as text and as an object, and the screen with its keys on a pseudo terminal.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::model::toy_job;
use espalier_tests::harness::wait_for;
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
const NO_MODEL: &str = "http://127.0.0.1:9/v1";

/// A coordinator with prices, a training worker, and two jobs that nobody takes.
async fn system() -> (Cluster, espalier_tests::harness::process::Process) {
    let cluster = Cluster::start_with(Setup {
        more: "[prices.workers]\ntrain = 2.5\nrollout = 1.0\n".to_owned(),
        ..Setup::new("embedded", NO_MODEL)
    })
    .await;
    let jobs: Vec<Value> = ["a", "b"]
        .map(|id| toy_job(id, &json!([{"answer": "done"}]), "done"))
        .into();
    cluster.client().await.submit("night", &jobs).await;
    let worker = cluster.train_worker("trainer");
    (cluster, worker)
}

async fn frame(cluster: &Cluster, more: &[&str]) -> Output {
    let mut command = cluster.operator(&cluster.addresses());
    command.arg("top").args(more);
    let run = tokio::task::spawn_blocking(move || command.output());
    run.await.unwrap().unwrap()
}

#[tokio::test]
async fn one_frame_is_text_and_one_object_with_the_rates_of_a_second() {
    let (cluster, _worker) = system().await;
    let told: Value = wait_for("the worker", DEADLINE, || async {
        let output = frame(&cluster, &["--json"]).await;
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        match told["workers"].as_array().is_some_and(|all| all.len() == 1) {
            true => Ok(told),
            false => Err(told),
        }
    })
    .await;
    assert_eq!(told["dollars_per_hour"], json!(2.5));
    assert_eq!(told["ends_per_s"], json!(0.0));
    assert_eq!(told["queues"][0]["ready"], json!(2));
    assert_eq!(told["batches"][0]["batch"], json!("night"));
    assert_eq!(
        (&told["pipelines"], &told["models"]),
        (&json!([]), &json!([]))
    );

    let output = frame(&cluster, &["--once"]).await;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    for words in [
        "workers: 1 at 1 coordinators",
        "2.50 $/h",
        "night",
        "0 of 2",
        "train",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(!text.contains('\u{1b}'), "plain text: {text:?}");
}

/// A command on a terminal of its own.
struct OnTerminal {
    child: Child,
    keyboard: File,
    /// The side of the command, by which the terminal's modes are seen.
    screen: File,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl OnTerminal {
    fn start(mut command: Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let screen = File::from(open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap());
        let size = Winsize {
            ws_row: 30,
            ws_col: 120,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&screen, size).unwrap();
        command.stdin(screen.try_clone().unwrap());
        command.stdout(screen.try_clone().unwrap());
        command.stderr(screen.try_clone().unwrap());
        let child = command.spawn().unwrap();
        let keyboard = File::from(master);
        let (mut reading, shown) = (
            keyboard.try_clone().unwrap(),
            Arc::<Mutex<Vec<u8>>>::default(),
        );
        let kept = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = reading.read(&mut bytes) {
                kept.lock().unwrap().extend(&bytes[..read]);
            }
        });
        Self {
            child,
            keyboard,
            screen,
            shown,
        }
    }

    /// The last screen that was drawn whole, or is being drawn.
    fn last(&self) -> String {
        let shown = self.shown.lock().unwrap();
        let text = String::from_utf8_lossy(&shown);
        text.rsplit("\u{1b}[H")
            .next()
            .unwrap_or_default()
            .to_owned()
    }

    async fn shows(&self, words: &str) {
        wait_for(words, DEADLINE, || {
            let last = self.last();
            async move { last.contains(words).then_some(()).ok_or(last) }
        })
        .await;
    }

    async fn shows_no(&self, words: &str) {
        wait_for("it to be gone", DEADLINE, || {
            let last = self.last();
            let whole = last.contains("q end") || last.contains("filter:");
            async move { (whole && !last.contains(words)).then_some(()).ok_or(last) }
        })
        .await;
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.screen).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    async fn ends(&mut self) {
        let status = wait_for("the end", DEADLINE, || {
            let ended = self.child.try_wait().unwrap();
            async move { ended.ok_or("it goes on") }
        })
        .await;
        assert!(status.success(), "{status:?}: {}", self.last());
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn keys_turn_sort_filter_and_end_it_and_the_terminal_is_given_back() {
    let (cluster, _worker) = system().await;
    let mut command = cluster.operator(&cluster.addresses());
    command.arg("top").env("TERM", "xterm-256color");
    let mut top = OnTerminal::start(command);
    top.shows("workers: 1 at 1 coordinators").await;
    top.shows("night").await;
    assert!(top.is_raw(), "keys come at once");

    top.press("4");
    top.shows("CONNECTED FOR").await;
    top.shows_no("night").await;
    top.press("ss");
    top.shows("RUNNING▼").await;
    top.press("r");
    top.shows("RUNNING▲").await;
    top.press("2/nig");
    top.shows("filter: nig_").await;
    top.press("q\r");
    top.shows("no row has the word of the filter").await;
    top.press("\u{1b}");
    top.shows("night").await;
    top.press(" ");
    top.shows("STOPPED").await;
    top.press(" ");
    top.shows("space stop").await;

    top.press("q");
    top.ends().await;
    assert!(!top.is_raw(), "the terminal is as it was");
    assert!(top.last().contains("\u{1b}[?1049l"), "so is its page");
}

#[tokio::test]
async fn a_signal_ends_it_too_and_a_coordinator_that_goes_away_is_waited_for() {
    let (mut cluster, _worker) = system().await;
    let mut command = cluster.operator(&cluster.addresses());
    command.arg("top").env("TERM", "xterm-256color");
    let mut top = OnTerminal::start(command);
    top.shows("night").await;
    cluster.coordinators[0].process.kill();
    top.shows("connection lost, trying again").await;
    // Keys are heard meanwhile.
    top.press("2");
    top.shows_no("WORKER ").await;
    cluster.restart_coordinator(0).await;
    wait_for("it to be back", DEADLINE, || {
        let last = top.last();
        let back = last.contains("night") && !last.contains("connection lost");
        async move { back.then_some(()).ok_or(last) }
    })
    .await;
    let pid = rustix::process::Pid::from_child(&top.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    top.ends().await;
    assert!(!top.is_raw(), "the terminal is as it was");
}
