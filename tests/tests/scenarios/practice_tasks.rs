//! The practice site's tasks are jobs: each line is read and checked as a submitted one would be.

use espalier_core::spec::parse_line;
use espalier_practice::tasks::{Split, generate};

#[test]
fn every_practice_task_is_a_valid_job() {
    for split in [Split::Train, Split::Eval] {
        for task in generate(7, 200, split) {
            let line = task.to_string().replace("${site}", "http://localhost:4310");
            let draft =
                parse_line(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {line}"));
            let spec = draft
                .check()
                .unwrap_or_else(|faults| panic!("{faults:?}: {line}"));
            assert!(spec.id.is_some());
        }
    }
}
