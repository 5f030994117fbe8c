//! A history that keeps every rule, and one that breaks each.

use super::*;

fn key(project: &str, n: usize) -> JobKey {
    format!("{project}/b/job-{n}").parse().unwrap()
}

fn grant(job: &JobKey, fence: u64, attempt: u32) -> Event {
    Event::Granted(Grant {
        job: job.clone(),
        fence,
        attempt,
        worker: "w".to_owned(),
    })
}

fn finish(job: &JobKey, fence: u64, outcome: &str, verdict: Verdict) -> Event {
    Event::Finished(Finish {
        job: job.clone(),
        fence,
        worker: "w".to_owned(),
        outcome: outcome.to_owned(),
        verdict,
    })
}

/// Two projects with four jobs each, granted by turns and done at once; the first job of the first project twice,
/// since its first lease ran out.
fn good() -> (History, End) {
    let keys = |project| (0..4).map(|n| key(project, n)).collect::<Vec<_>>();
    let chunks = vec![keys("a"), keys("b")];
    let mut events = Vec::new();
    for n in 0..4 {
        for (side, chunk) in (0..).zip(&chunks) {
            let fence = 10 * n as u64 + side + 1;
            events.push(grant(&chunk[n], fence, 1));
            if fence > 1 {
                events.push(finish(&chunk[n], fence, "succeeded", Verdict::Accepted));
            }
        }
    }
    events.push(grant(&chunks[0][0], 50, 2));
    events.push(finish(&chunks[0][0], 1, "succeeded", Verdict::Stale));
    events.push(finish(&chunks[0][0], 50, "succeeded", Verdict::Accepted));
    let ended = |key: &JobKey| {
        let again = u32::from(*key == chunks[0][0]);
        let ended = Ended {
            state: JobState::Succeeded,
            attempts: 1 + again,
            handler_failures: 0,
            infra_failures: again,
        };
        (key.clone(), ended)
    };
    let end = End {
        jobs: chunks.iter().flatten().map(ended).collect(),
        counts: Counts {
            succeeded: 8,
            ..Counts::default()
        },
    };
    let history = History {
        chunks,
        events,
        holes: false,
    };
    (history, end)
}

/// Breaks a good history and expects to be told `rule`, and nothing if it is empty.
fn check(rule: &str, break_it: impl FnOnce(&mut History, &mut End)) {
    let (mut history, mut end) = good();
    break_it(&mut history, &mut end);
    let broken = history.broken(&end, 2);
    match rule {
        "" => assert!(broken.is_empty(), "{broken:#?}"),
        rule => assert!(
            broken.iter().any(|b| b.contains(rule)),
            "{rule}: {broken:#?}"
        ),
    }
}

fn remove(history: &mut History, gone: impl Fn(&Event) -> bool) {
    let before = history.events.len();
    history.events.retain(|event| !gone(event));
    assert!(history.events.len() < before, "nothing was removed");
}

#[test]
fn a_good_history_keeps_every_rule() {
    check("", |_, _| {});
}

#[test]
fn a_lost_job_is_told() {
    check("was acknowledged and has not ended", |history, end| {
        let lost = key("b", 2);
        remove(history, |e| matches!(e, Event::Granted(g) if g.job == lost));
        remove(
            history,
            |e| matches!(e, Event::Finished(f) if f.job == lost),
        );
        end.jobs.remove(&lost);
        end.counts.succeeded -= 1;
    });
    check("was granted and has not ended", |history, _| {
        history.events.push(grant(&key("c", 0), 99, 1));
    });
}

#[test]
fn a_second_result_is_told() {
    check("two results of a/b/job-1", |history, end| {
        history.events.push(grant(&key("a", 1), 60, 2));
        let again = finish(&key("a", 1), 60, "succeeded", Verdict::Accepted);
        history.events.push(again);
        end.jobs.get_mut(&key("a", 1)).unwrap().attempts = 2;
    });
    check("a lease ended twice", |history, _| {
        let again = finish(&key("a", 1), 11, "succeeded", Verdict::Accepted);
        history.events.push(again);
    });
}

#[test]
fn a_repetition_that_is_known_is_no_second_result() {
    check("", |history, _| {
        let again = finish(&key("a", 1), 11, "succeeded", Verdict::Known);
        history.events.push(again);
    });
}

#[test]
fn a_lost_result_is_told() {
    check("the accepted result of b/b/job-3 is lost", |_, end| {
        end.jobs.get_mut(&key("b", 3)).unwrap().state = JobState::Dead;
        end.counts.succeeded -= 1;
        end.counts.dead += 1;
    });
    check("nobody was told so", |history, _| {
        let silent = key("b", 3);
        remove(
            history,
            |e| matches!(e, Event::Finished(f) if f.job == silent),
        );
    });
}

#[test]
fn a_fence_that_comes_again_is_told() {
    check("a fence was given twice", |history, end| {
        history.events.push(grant(&key("a", 0), 41, 3));
        history.events.push(grant(&key("a", 0), 41, 4));
        end.jobs.get_mut(&key("a", 0)).unwrap().attempts = 4;
    });
    check("a fence was given twice", |history, _| {
        history.events.push(grant(&key("a", 2), 50, 1));
    });
}

#[test]
fn fences_that_do_not_grow_are_told() {
    check("fences of a/b/job-0 did not grow", |history, end| {
        history.events.push(grant(&key("a", 0), 45, 3));
        end.jobs.get_mut(&key("a", 0)).unwrap().attempts = 3;
    });
}

#[test]
fn a_grant_after_the_result_is_told() {
    check("came after the result under 11", |history, end| {
        history.events.push(grant(&key("a", 1), 70, 2));
        end.jobs.get_mut(&key("a", 1)).unwrap().attempts = 2;
    });
    // Nobody saw the grant; its end is enough, also where lines are missing.
    check("contradicts the result under 11", |history, _| {
        history.holes = true;
        let later = finish(&key("a", 1), 70, "released", Verdict::Accepted);
        history.events.push(later);
    });
}

#[test]
fn an_answer_that_denies_the_result_is_told() {
    check("contradicts the result under 11", |history, _| {
        let denied = finish(&key("a", 1), 11, "succeeded", Verdict::Stale);
        history.events.push(denied);
    });
}

#[test]
fn an_end_of_somebody_elses_lease_is_told() {
    check("was accepted, and it is", |history, _| {
        history.holes = true;
        for event in &mut history.events {
            if let Event::Finished(finish) = event {
                finish.worker = "x".to_owned();
            }
        }
    });
}

#[test]
fn an_end_without_a_grant_is_told_unless_lines_are_missing() {
    let forget = |history: &mut History| {
        let job = key("a", 3);
        remove(history, |e| matches!(e, Event::Granted(g) if g.job == job));
    };
    check("nobody granted it", |history, _| forget(history));
    check("", |history, _| {
        history.holes = true;
        forget(history);
        let job = key("b", 3);
        remove(history, |e| matches!(e, Event::Finished(f) if f.job == job));
    });
}

#[test]
fn counters_that_are_not_the_historys_are_told() {
    check("the counters are", |_, end| end.counts.succeeded -= 1);
    check("was granted more often than", |_, end| {
        let ended = end.jobs.get_mut(&key("a", 0)).unwrap();
        (ended.attempts, ended.infra_failures) = (1, 0);
    });
    check("ended more often than it was granted", |_, end| {
        end.jobs.get_mut(&key("a", 0)).unwrap().infra_failures = 2;
    });
    check("failed 0 times", |_, end| {
        let ended = end.jobs.get_mut(&key("a", 0)).unwrap();
        (ended.handler_failures, ended.infra_failures) = (1, 0);
    });
    check("failures of a/b/job-0 were forgotten", |history, end| {
        let failed = finish(&key("a", 0), 1, "infra", Verdict::Accepted);
        history.events.push(failed);
        end.jobs.get_mut(&key("a", 0)).unwrap().infra_failures = 0;
    });
}

#[test]
fn a_project_that_gets_ahead_is_told() {
    // The second project is granted at the end only.
    let late = |history: &mut History| {
        for event in &mut history.events {
            let (job, fence) = match event {
                Event::Granted(grant) => (&grant.job, &mut grant.fence),
                Event::Finished(finish) => (&finish.job, &mut finish.fence),
            };
            if job.project.as_str() == "b" && *fence > 2 {
                *fence += 100;
            }
        }
    };
    check("one got 3 grants ahead between 2 and 31", |history, _| {
        late(history)
    });
    // A project of which nothing is ready any more loses nothing by the other's grants.
    check("", |history, end| {
        for n in 4..20 {
            let job = key("b", n);
            history.events.push(grant(&job, 200 + n as u64, 1));
            let done = finish(&job, 200 + n as u64, "succeeded", Verdict::Accepted);
            history.events.push(done);
            let ended = end.jobs[&key("b", 1)].clone();
            end.jobs.insert(job.clone(), ended);
            history.chunks[1].push(job);
            end.counts.succeeded += 1;
        }
    });
}

#[test]
fn the_lines_of_a_coordinator_are_read_and_no_others() {
    let log = concat!(
        r#"{"level":"INFO","message":"worker connected","target":"espalier_coordinator::session"}"#,
        "\n",
        r#"{"timestamp":"t","level":"DEBUG","message":"granted","job":"a/b/job-1","fence":11,"attempt":1,"worker":"w","target":"espalier_coordinator::history"}"#,
        "\n",
        r#"{"level":"DEBUG","message":"finished","job":"a/b/job-1","fence":11,"worker":"w","outcome":"succeeded","verdict":"accepted","target":"espalier_coordinator::history"}"#,
        "\n",
    );
    let job = key("a", 1);
    let expected = [
        grant(&job, 11, 1),
        finish(&job, 11, "succeeded", Verdict::Accepted),
    ];
    assert_eq!(log::read(log, false), expected);
    let torn = format!("{log}{}", &log[90..150]);
    assert_eq!(log::read(&torn, true), expected);
}
