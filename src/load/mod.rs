//! The load generator: sends messages to any echo service, and checks every byte that comes back.
//!
//! It guarantees that it sees every byte that is lost, repeated, moved, changed, or taken from another connection.
//! A message's latency counts from when the message was sent, or with a rate from when it was *due*. A server that
//! stalls therefore cannot hide behind a generator that waits for it ([coordinated omission]). Messages that are never
//! answered, and times without any answer, are in the report too. Flags, signals and printing are left to `cli`.
//!
//! A few threads each wait for their share of the connections. A *slot* holds one connection at a time and
//! opens the next when one ends. Threads share nothing per message, and each returns its own tally at the end.
//!
//! # A thread's phases
//!
//! 1. *Opening*: the thread opens every connection, for a limited time, before the first message. Then it is *ready*
//!    and waits until all threads are, so that they begin to send at the same time.
//! 2. *Running*: messages go out until the time is over or the number is reached. The phase also ends if the caller
//!    stops the run, or if the slots of all threads have given up.
//! 3. *Settling*: the thread sends nothing new, and waits for the answers that are still missing, for a limited time.
//! 4. *Settled*: the thread writes off the answers that have not come. It waits until all threads have come this far,
//!    and closes nothing before. Otherwise a service with few threads would serve the starved connections as soon as
//!    the others are closed.
//! 5. *Closing*: the thread half-closes each connection and reads it to its end, so that it sees even bytes after the
//!    last answer.
//!
//! | module | what |
//! | --- | --- |
//! | `engine` | a thread: its slots, events, phases |
//! | `idle` | connections that stay open and silent |
//! | `slot` | one connection after another: stages, sending, receiving |
//! | `silence` | how long a slot has waited for a byte of an answer |
//! | `talk` | what was sent on a connection, and whether what comes back is the same |
//! | `pattern` | the bytes |
//! | `dial` | opening sockets, from several source addresses if necessary |
//! | `schedule` | when messages are due, and waiting for it |
//! | `unanswered` | when messages were due that never got an answer |
//! | `report` | errors by kind, mismatches, latencies |
//! | `plan` | what a run does |
//!
//! [coordinated omission]: https://www.youtube.com/watch?v=lJ8ydIuPFeU

mod dial;
mod engine;
mod idle;
mod pattern;
mod plan;
#[cfg(any(test, fuzzing))]
pub(crate) mod properties;
mod report;
mod schedule;
mod silence;
mod slot;
mod talk;
mod unanswered;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use self::dial::Dial;
pub(crate) use self::dial::local_ports;
pub(crate) use self::engine::FAILURES_IN_ROW;
pub(crate) use self::plan::{Plan, Until};
use self::report::Tally;
pub(crate) use self::report::{Failure, Origin, Report};

/// The time between two calls of [`run`]'s `progress`.
const PROGRESS: Duration = Duration::from_secs(1);

/// The state that the threads of a run share.
#[derive(Debug)]
struct Shared<'run> {
    /// The epoch of all times.
    start: Instant,
    /// Connections begun so far, which numbers them from 1. Each thread adds one for a connection that it begins to
    /// open. Relaxed, because nothing but the number depends on it.
    attempted: AtomicU64,
    /// Ends the run early. Set by the caller, for example in a signal handler, and read by all threads. Relaxed,
    /// because no other data is published with it.
    stop: &'run AtomicBool,
    /// Threads that are ready to send, that send nothing more, and that have settled. A thread that failed counts in
    /// all three. Each thread adds itself once, and goes on when all have. Relaxed, because no other data is
    /// published with them.
    ready: AtomicUsize,
    finished: AtomicUsize,
    settled: AtomicUsize,
    /// How far each thread is. The thread writes it in each sweep, and `progress` reads it.
    live: Vec<Live>,
}

#[derive(Debug, Default)]
struct Live {
    messages: AtomicU64,
    failures: AtomicU64,
    open: AtomicU64,
}

impl Shared<'_> {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The next connection's number.
    fn number(&self) -> u64 {
        self.attempted.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn progress(&self) -> Progress {
        let sum = |of: fn(&Live) -> &AtomicU64| {
            self.live.iter().map(|live| of(live).load(Ordering::Relaxed)).sum::<u64>()
        };
        Progress {
            elapsed: self.start.elapsed(),
            messages: sum(|live| &live.messages),
            failures: sum(|live| &live.failures),
            open: sum(|live| &live.open),
        }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    pub(crate) elapsed: Duration,
    /// Answered so far, without those of the warm-up.
    pub(crate) messages: u64,
    pub(crate) failures: u64,
    /// Connections open now.
    pub(crate) open: u64,
}

/// Carries out the plan on threads of its own. It blocks for the plan's time, or until `stop` is set, and then for as
/// long as the last answers and the clean closes take. It calls `progress` once a second.
///
/// # Errors
///
/// If a thread or a poller cannot be made.
pub(crate) fn run(plan: &Plan, stop: &AtomicBool, mut progress: impl FnMut(Progress)) -> io::Result<Report> {
    let shared = Shared {
        start: Instant::now(),
        attempted: AtomicU64::new(0),
        stop,
        ready: AtomicUsize::new(0),
        finished: AtomicUsize::new(0),
        settled: AtomicUsize::new(0),
        live: std::iter::repeat_with(Live::default).take(plan.threads + 1).collect(),
    };
    let (shared, dial) = (&shared, &Dial::new(plan));
    let tally = thread::scope(|scope| {
        let tally = share_out(plan, (shared, dial), scope, &mut progress);
        if tally.is_err() {
            // The scope waits for the other threads, and their results are not needed.
            stop.store(true, Ordering::Relaxed);
        }
        tally
    })?;
    Ok(tally.into_report(shared.attempted.load(Ordering::Relaxed)))
}

/// Starts the threads, and adds up their tallies.
fn share_out<'scope, 'run: 'scope>(
    plan: &'run Plan,
    (shared, dial): (&'run Shared<'run>, &'run Dial),
    scope: &'scope thread::Scope<'scope, '_>,
    progress: &mut impl FnMut(Progress),
) -> io::Result<Tally> {
    let mut report = Tally::new();
    let (until, watched) = bounded::<()>(0);
    let (open, opened) = bounded::<()>(1);
    let (home, idle_home) = bounded(1);
    if plan.idle > 0 {
        let idle = idle::Idle::new(plan, shared, dial)?;
        let builder = thread::Builder::new().name("mill-idle".to_owned());
        builder.spawn_scoped(scope, move || {
            // If another thread has failed, the receiver is gone.
            let _ = home.send(idle.run(&open, &watched));
        })?;
        // The load begins when the silent connections are open, not while they are being opened.
        wait(&opened, shared, progress);
    }
    let engines: Vec<_> = (0..plan.threads)
        .map(|thread| engine::Engine::new(plan, shared, dial, thread))
        .collect::<io::Result<_>>()?;
    let (home, loads_home) = bounded(plan.threads);
    for (number, engine) in engines.into_iter().enumerate() {
        let home = home.clone();
        let builder = thread::Builder::new().name(format!("mill-load-{}", number + 1));
        builder.spawn_scoped(scope, move || {
            let _ = home.send(engine.run());
        })?;
    }
    drop(home);
    for _ in 0..plan.threads {
        report.merge(wait(&loads_home, shared, progress).unwrap_or_else(failed)?);
    }
    // The silent connections are watched for as long as there is load.
    drop(until);
    if plan.idle > 0 {
        report.merge(wait(&idle_home, shared, progress).unwrap_or_else(failed)?);
    }
    Ok(report)
}

/// Waits for a message, and calls `progress` meanwhile. `None` if the sender is gone.
fn wait<T>(from: &Receiver<T>, shared: &Shared<'_>, progress: &mut impl FnMut(Progress)) -> Option<T> {
    loop {
        match from.recv_timeout(PROGRESS) {
            Ok(message) => return Some(message),
            Err(RecvTimeoutError::Timeout) => progress(shared.progress()),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

fn failed<T>() -> io::Result<T> {
    Err(io::Error::other("a thread of the load generator failed"))
}
