//! As much of the test runner's command line as cargo and cargo-nextest use, with tests that are ignored by what the
//! machine has.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use espalier_kernels::cuda::{library, report};

/// What a test cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// The compiler of kernels.
    Nvrtc,
    /// A GPU.
    Device,
    /// A GPU on which cuDNN attends.
    Cudnn,
}

pub struct Test {
    pub name: &'static str,
    pub needs: Needs,
    pub run: Box<dyn Fn()>,
}

/// What `make setup-test` installs into, below the root of the tree.
fn venv() -> PathBuf {
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let mut venvs = folders.map(|folder| folder.join("target/venv"));
    venvs
        .find(|venv| venv.is_dir())
        .unwrap_or_else(|| PathBuf::from("target/venv"))
}

/// Folders of the virtual environment that hold libraries of NVIDIA.
pub fn library_folders() -> Vec<PathBuf> {
    let entries = |path: &Path| {
        std::fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .collect::<Vec<_>>()
    };
    let pythons = entries(&venv().join("lib"));
    let packages = pythons
        .iter()
        .flat_map(|python| entries(&python.join("site-packages/nvidia")));
    packages
        .map(|package| package.join("lib"))
        .filter(|lib| lib.is_dir())
        .collect()
}

impl Needs {
    /// Why a test with this need is left out, if it is.
    fn missing(self) -> Option<&'static str> {
        match self {
            // Where it was installed, its absence is a failure: a test that is left out shows nothing.
            Self::Nvrtc if library::nvrtc_present() || venv().join("ready").exists() => None,
            Self::Nvrtc => Some("NVRTC is not here: `make setup-test` installs it"),
            Self::Cudnn => {
                let attends = report::look().attends_by_cudnn();
                (!attends).then_some("no GPU with a cuDNN that attends is here")
            }
            Self::Device => {
                let devices = report::look().driver.and_then(|driver| driver.devices.ok());
                devices
                    .is_none_or(|d| d.is_empty())
                    .then_some("no GPU is here")
            }
        }
    }
}

#[derive(Default)]
struct Arguments {
    list: bool,
    ignored: bool,
    include_ignored: bool,
    exact: bool,
    filters: Vec<String>,
}

impl Arguments {
    fn parse() -> Self {
        let mut parsed = Self::default();
        let mut given = std::env::args().skip(1);
        while let Some(argument) = given.next() {
            match argument.as_str() {
                "--list" => parsed.list = true,
                "--ignored" => parsed.ignored = true,
                "--include-ignored" => parsed.include_ignored = true,
                "--exact" => parsed.exact = true,
                "--format" | "--test-threads" | "--color" | "-Z" => drop(given.next()),
                flag if flag.starts_with('-') => {}
                _ => parsed.filters.push(argument),
            }
        }
        parsed
    }

    fn takes(&self, name: &str) -> bool {
        let one = |filter: &String| {
            if self.exact {
                filter == name
            } else {
                name.contains(filter.as_str())
            }
        };
        self.filters.is_empty() || self.filters.iter().any(one)
    }
}

pub fn run(tests: Vec<Test>) -> ExitCode {
    library::look_in(&library_folders());
    let arguments = Arguments::parse();
    let every = [Needs::Nvrtc, Needs::Device, Needs::Cudnn].map(|need| (need, need.missing()));
    let missing = |test: &Test| {
        let own = every.iter().find(|(need, _)| *need == test.needs);
        own.and_then(|(_, missing)| *missing)
    };
    let taken = tests.iter().filter(|test| arguments.takes(test.name));
    if arguments.list {
        for test in taken.filter(|test| !arguments.ignored || missing(test).is_some()) {
            println!("{}: test", test.name);
        }
        return ExitCode::SUCCESS;
    }
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    for test in taken {
        let reason = missing(test);
        if arguments.ignored && reason.is_none() {
            continue;
        }
        if let Some(reason) = reason.filter(|_| !arguments.ignored && !arguments.include_ignored) {
            println!("test {} ... ignored, {reason}", test.name);
            ignored += 1;
            continue;
        }
        let kept = catch_unwind(AssertUnwindSafe(|| (test.run)())).is_ok();
        println!(
            "test {} ... {}",
            test.name,
            if kept { "ok" } else { "FAILED" }
        );
        *(if kept { &mut passed } else { &mut failed }) += 1;
    }
    println!("\ntest result: {passed} passed; {failed} failed; {ignored} ignored");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
