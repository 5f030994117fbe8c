//! A small disk that a test's processes see alone: a tmpfs in a mount namespace of its own, so that it can be filled
//! without harm to anything else. It outlives the processes that use it, and goes with the test.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Mounts a tmpfs of `$2` bytes on `$1`, says so, and keeps the namespace until its input ends, as it does with the test.
const KEEP: &str =
    "mount -t tmpfs -o size=\"$2\" small \"$1\" && echo mounted && exec cat >/dev/null";
/// Becomes a command line in the folder `$1`: entering a namespace leads to its root.
const ENTER: &str = "cd \"$1\" && shift && exec \"$@\"";
/// What fills a disk, a page at a time: the least that a tmpfs gives.
const PAGE: [u8; 4096] = [b'x'; 4096];

/// The variable by which a person leaves these tests out.
pub const OPT_OUT: &str = "ESPALIER_TEST_WITHOUT_DISKS";

/// A small disk on a folder.
#[derive(Debug)]
pub struct SmallDisk {
    keeper: Child,
    folder: PathBuf,
    enter: &'static [&'static str],
}

impl SmallDisk {
    /// A disk of `bytes` on `folder`. Where the machine lets nobody mount, even in a user namespace, the test fails: one
    /// that is left out in silence proves nothing. It gives none only where [`OPT_OUT`] is set.
    pub fn mount(folder: &Path, bytes: u64) -> Option<Self> {
        std::fs::create_dir_all(folder).expect("the test's folder is writable");
        let mount = |unshare: &[&str], enter: &'static [&'static str]| {
            let mut keeper = Command::new("unshare")
                .args(unshare)
                .args(["sh", "-c", KEEP, "sh"])
                .arg(folder)
                .arg(bytes.to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .ok()?;
            let mut said = String::new();
            let stdout = keeper.stdout.take().expect("it is piped");
            let _ = BufReader::new(stdout).read_line(&mut said);
            let disk = Self {
                keeper,
                folder: folder.to_owned(),
                enter,
            };
            (said == "mounted\n").then_some(disk)
        };
        let disk = mount(&["--mount"], &["--mount"]).or_else(|| {
            mount(
                &["--user", "--map-root-user", "--mount"],
                &["--user", "--preserve-credentials", "--mount"],
            )
        });
        let opted_out = || std::env::vars_os().any(|(name, _)| name == OPT_OUT);
        assert!(
            disk.is_some() || opted_out(),
            "nobody may mount a tmpfs in a namespace of their own here: allow it, or set {OPT_OUT}=1 to leave out the \
             tests that fill a disk"
        );
        disk
    }

    /// `command`, as it runs where the disk is. The process keeps its id.
    pub fn command(&self, command: &Command) -> Command {
        let here = std::env::current_dir().expect("a test has a folder");
        let mut inside = Command::new("nsenter");
        inside
            .arg(format!("--target={}", self.keeper.id()))
            .args(self.enter)
            .args(["sh", "-c", ENTER, "sh"])
            .arg(command.get_current_dir().unwrap_or(&here))
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    /// A path of those processes, as everybody else finds it.
    pub fn seen(&self, path: &Path) -> PathBuf {
        let inside = path.strip_prefix("/").unwrap_or(path);
        Path::new("/proc")
            .join(format!("{}/root", self.keeper.id()))
            .join(inside)
    }

    /// Takes all the space that is left; again for what was let go of since.
    pub fn fill(&self) {
        let file = File::options()
            .create(true)
            .append(true)
            .open(self.filling());
        let mut file = file.expect("the disk is there");
        loop {
            match file.write_all(&PAGE) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return,
                Err(error) => panic!("cannot fill {}: {error}", self.folder.display()),
            }
        }
    }

    /// Gives back what [`SmallDisk::fill`] took.
    pub fn free(&self) {
        std::fs::remove_file(self.filling()).expect("what fills the disk is there");
    }

    fn filling(&self) -> PathBuf {
        self.seen(&self.folder.join("filling"))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
