//! The program: reads its flags, runs the command that they name, and exits with a code that says how it ended.

mod cli;
mod load;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::signals::survive_file_size_limit();
    let mut args = std::env::args_os();
    match args.nth(1) {
        Some(command) if command == "load" => match cli::load::parse(args) {
            Ok(flags) => cli::load::run(&flags),
            Err(exit) => exit,
        },
        Some(command) if command == "health" => match cli::health::parse(args) {
            Ok(flags) => cli::health::run(&flags),
            Err(exit) => exit,
        },
        _ => match cli::config::parse(std::env::args_os()) {
            Ok(config) => cli::serve::run(&config),
            Err(exit) => exit,
        },
    }
}
