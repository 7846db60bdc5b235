//! The log, on standard error.
//!
//! A separate thread writes the lines, from a queue of bounded length. If the reader of standard error stops reading,
//! the log drops lines and the server goes on. It also drops a line that cannot be written. Standard error may be
//! closed, on a full disk, or a file at its limit of size. Panics are logged too, as one line each.

use std::io;

use tracing::Level;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};

use millpond::panic_message;

use super::config::{Config, LogFormat};

/// The most lines in the queue: enough for a burst, and at most a few hundred kilobytes.
const QUEUE: usize = 4096;

/// Starts the log. Dropping the guard writes the lines that are still in the queue, and takes about a second at most.
/// Returns `None` if the system refuses the thread.
pub(crate) fn start(config: &Config) -> Option<WorkerGuard> {
    // The crate panics if it cannot start its thread. No other thread runs yet, so this hides no other panic.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let started = std::panic::catch_unwind(|| {
        NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(QUEUE)
            .thread_name("mill-log")
            .finish(io::stderr())
    });
    std::panic::set_hook(hook);
    let (writer, guard) = started.ok()?;
    let level = match config {
        Config { verbose: true, .. } => Level::DEBUG,
        Config { quiet: true, .. } => Level::WARN,
        _ => Level::INFO,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .log_internal_errors(false)
        .with_writer(writer);
    match config.log {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        // The server reports a service's panic, with its connection and at a limited rate. So this line, which has the
        // location, is for debugging only. The field is not named `message`, which is the event's own name.
        let panic = panic_message(panic.payload());
        if thread.name().is_some_and(|name| name.starts_with("mill-echo-")) {
            tracing::debug!(thread = thread.name(), location, panic, "a worker panicked");
        } else {
            tracing::error!(thread = thread.name(), location, panic, "a thread panicked");
        }
    }));
    Some(guard)
}
