//! The `espalier` binary. Everything is in the library, so that tests can call it.

use std::process::ExitCode;

fn main() -> ExitCode {
    espalier_cli::main()
}
