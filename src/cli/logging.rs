//! The log, on standard error.
//!
//! A thread of its own writes it, from a queue of bounded length: when whoever reads standard error stops
//! reading, lines are dropped and the server goes on. A closed standard error is ignored. Panics go the same
//! way, as one line each.

use std::io;

use tracing::Level;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};

use millpond::panic_message;

use super::config::{Config, LogFormat};

/// Lines that may wait to be written: enough for a burst, and at most a few hundred kilobytes.
const QUEUE: usize = 4096;

/// Starts the log. What waits is written when the guard is dropped, within about a second. `None` when the system
/// refuses the thread that is to write it.
pub(crate) fn start(config: &Config) -> Option<WorkerGuard> {
    // The crate panics when it cannot have its thread. Nothing else runs yet, so nobody else's panic is kept quiet.
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
        // A service's panic is reported by the server, with its connection and within bounds; its place is
        // for who looks closer.
        // Not named `message`: that is the event's own.
        let panic = panic_message(panic.payload());
        if thread.name().is_some_and(|name| name.starts_with("mill-echo-")) {
            tracing::debug!(thread = thread.name(), location, panic, "a worker panicked");
        } else {
            tracing::error!(thread = thread.name(), location, panic, "a thread panicked");
        }
    }));
    Some(guard)
}
