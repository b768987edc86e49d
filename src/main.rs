//! The `virtnode` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    virtnode::cli::main()
}
