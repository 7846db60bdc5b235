//! The program: reads its flags, runs what they ask for, and says how it ended in its exit code.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::config::parse(std::env::args_os()) {
        Ok(config) => cli::serve::run(&config),
        Err(exit) => exit,
    }
}
