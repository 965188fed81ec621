//! The `shardmill` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    shardmill_cli::main()
}
