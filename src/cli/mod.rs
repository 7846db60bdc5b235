//! The parts that the program adds to the library: flags, a log, signals, exit codes.

pub(crate) mod config;
pub(crate) mod health;
pub(crate) mod load;
pub(crate) mod logging;
mod manager;
mod memory;
#[cfg(any(test, fuzzing))]
pub(crate) mod properties;
pub(crate) mod serve;
pub(crate) mod signals;
pub(crate) mod summary;

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// The exit codes that are not 0.
pub(crate) const FAILED: u8 = 1;
pub(crate) const USAGE: u8 = 2;
pub(crate) const CUT: u8 = 3;
/// The exit code with which a shell reports a program that SIGINT ended.
pub(crate) const ABANDONED: u8 = 130;

/// Writes on standard error, in one line, why the program ends, and returns the exit code. If standard error is closed
/// or full, the exit code is all that is left.
pub(crate) fn fail(code: u8, why: impl Display) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "millpond: {why}");
    ExitCode::from(code)
}

/// Prints on standard output. If the reader has closed its end, that is no error, because it does not want the rest.
///
/// # Errors
///
/// If standard output accepts no more bytes, as on a full disk or beyond a limit on the size of files.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

/// An error and its sources, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line = format!("{line}: {error}");
        source = error.source();
    }
    line
}

/// Asserts that a flag accepts the good values, and rejects the bad ones in one line that names the flag.
#[cfg(test)]
fn assert_takes<T>(
    flag: &str,
    good: [&str; 2],
    bad: [&str; 2],
    parsed: impl Fn(&[&str]) -> Result<T, String>,
) {
    for value in good {
        let arg = format!("{flag}={value}");
        assert!(parsed(&[&arg]).is_ok(), "{arg}: {:?}", parsed(&[&arg]).err());
    }
    for value in bad {
        let arg = format!("{flag}={value}");
        let message = parsed(&[&arg]).err().unwrap_or_else(|| panic!("{arg} is taken"));
        assert!(message.contains(flag) && !message.contains('\n'), "{arg}: {message}");
    }
}
