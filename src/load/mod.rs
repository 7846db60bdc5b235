//! The load generator: sends messages to any echo service, and checks every byte that comes back.
//!
//! It guarantees that a byte lost, repeated, moved, changed, or taken from another connection is seen, and that
//! a message's time counts from when it was sent, or with a rate from when it was *due*, so that a server
//! that stalls cannot hide behind a generator that waits for it ([coordinated omission]). It leaves flags,
//! signals and printing to `cli`.
//!
//! A few threads each wait for their share of the connections. A *slot* holds one connection at a time and
//! opens the next when one ends. Threads share nothing per message; each brings its own tally home at the end.
//!
//! # A thread's phases
//!
//! 1. *Opening*: every connection is opened, for a limited time, before the first message. Then the thread is *ready*,
//!    and waits until all are, so that they send at the same time.
//! 2. *Running*: messages go out, until the time is over, the number is reached, or it is told to stop.
//! 3. *Settling*: nothing new is sent; answers that are still due are waited for, for a limited time.
//! 4. *Settled*: what has not come is written off. The thread waits until all have come this far, and closes
//!    nothing: a service with few threads would turn to the starved as soon as the served are gone.
//! 5. *Closing*: each connection is half-closed and read to its end, so that even bytes after the last answer
//!    are seen.
//!
//! | module | what |
//! | --- | --- |
//! | `engine` | a thread: its slots, events, phases |
//! | `idle` | connections that stay open and silent |
//! | `slot` | one connection after another: stages, sending, receiving |
//! | `talk` | what was sent on a connection, and whether what comes back is that |
//! | `pattern` | the bytes |
//! | `dial` | opening sockets, from several source addresses if need be |
//! | `schedule` | when messages are due, and waiting for it |
//! | `report` | errors by kind, mismatches, latencies |
//! | `plan` | what a run is to do |
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
mod slot;
mod talk;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use self::dial::Dial;
pub(crate) use self::dial::local_ports;
pub(crate) use self::plan::{Plan, Until};
use self::report::Tally;
pub(crate) use self::report::{Failure, Origin, Report};

/// How often the caller of [`run`] hears how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

/// What the threads of a run share.
#[derive(Debug)]
struct Shared<'run> {
    /// The epoch of all times.
    start: Instant,
    /// Connections opened so far, which numbers them from 1. Counted up by whoever opens one; the number itself
    /// is all that matters, so relaxed.
    opened: AtomicU64,
    /// Set by the caller, by a signal handler for one, and read by all: end early. Relaxed, as nothing else is
    /// handed over with it.
    stop: &'run AtomicBool,
    /// Threads that are ready to send, and those that have settled; who is gone counts. Each adds itself once, and
    /// goes on when all have. Relaxed, as nothing else is handed over with them.
    ready: AtomicUsize,
    settled: AtomicUsize,
    /// How far each thread is: written by it now and then, read for progress.
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
        self.opened.fetch_add(1, Ordering::Relaxed) + 1
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
    /// Answered so far, but for the warm-up's.
    pub(crate) messages: u64,
    pub(crate) failures: u64,
    /// Connections open now.
    pub(crate) open: u64,
}

/// Does what the plan says, on threads of its own, and blocks until that is done: for the plan's time, or until
/// `stop` is set, and then for what a last answer and a clean close may take. `progress` is called once a second.
///
/// # Errors
///
/// When a thread or a poller cannot be made.
pub(crate) fn run(plan: &Plan, stop: &AtomicBool, mut progress: impl FnMut(Progress)) -> io::Result<Report> {
    let shared = Shared {
        start: Instant::now(),
        opened: AtomicU64::new(0),
        stop,
        ready: AtomicUsize::new(0),
        settled: AtomicUsize::new(0),
        live: std::iter::repeat_with(Live::default).take(plan.threads + 1).collect(),
    };
    let (shared, dial) = (&shared, &Dial::new(plan));
    let tally = thread::scope(|scope| {
        let tally = share_out(plan, (shared, dial), scope, &mut progress);
        if tally.is_err() {
            // The others run in vain, and the scope waits for them.
            stop.store(true, Ordering::Relaxed);
        }
        tally
    })?;
    Ok(tally.into_report(shared.opened.load(Ordering::Relaxed)))
}

/// Starts the threads, and collects what they have seen.
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
            // Nobody waits for it when another thread has failed.
            let _ = home.send(idle.run(&open, &watched));
        })?;
        // The load begins beside open connections, not while they are being opened.
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
    // The idle ones were watched for as long as there was load.
    drop(until);
    if plan.idle > 0 {
        report.merge(wait(&idle_home, shared, progress).unwrap_or_else(failed)?);
    }
    Ok(report)
}

/// Waits for something to come, and tells of the progress meanwhile. `None` when nothing will come any more.
fn wait<T>(from: &Receiver<T>, shared: &Shared<'_>, progress: &mut impl FnMut(Progress)) -> Option<T> {
    loop {
        match from.recv_timeout(PROGRESS) {
            Ok(come) => return Some(come),
            Err(RecvTimeoutError::Timeout) => progress(shared.progress()),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

fn failed<T>() -> io::Result<T> {
    Err(io::Error::other("a thread of the load generator failed"))
}
