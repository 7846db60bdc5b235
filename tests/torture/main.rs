//! Drains at random moments of random load: whatever stands in the way, nothing that was read is lost without being
//! counted, the exit code says what happened, and the accounts balance.
//!
//!     MILLPOND_TORTURE_ROUNDS=200 cargo test --release --test torture -- --nocapture
//!
//! A round is drawn from a seed: the server's settings, what each client does, and when the signal comes. A failure
//! names the seed of its round, and `MILLPOND_TORTURE_SEED=N MILLPOND_TORTURE_ROUNDS=1` has the same round again; how
//! its threads take turns is the system's to say. Without a seed, each run draws its own.

#[path = "../common/mod.rs"]
mod common;

mod client;
mod plan;
mod subject;

use std::any::Any;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use client::{End, Outcome, Stage};
use common::report::Report;
use common::scrape::Scrape;
use common::{eventually, thread_states, try_http};
use plan::{Manner, Plan};
use subject::{Ended, Inside, Program, Subject};

/// Rounds of each test unless `MILLPOND_TORTURE_ROUNDS` says otherwise.
const ROUNDS: u64 = 10;

/// Rounds at a time: nearly all of a round is waiting.
const AT_ONCE: u64 = 6;

/// What a worker reads, and sends back, at a time.
const BUFFER: u64 = 64 * 1024;

/// With this many rounds, some must have been clean and some cut, or the draw is no good.
const MANY: u64 = 50;

#[test]
fn the_program_loses_no_byte_and_its_exit_code_is_right() {
    rounds::<Program>();
}

#[test]
fn a_server_in_this_process_loses_no_byte_and_leaves_no_thread() {
    millpond::raise_descriptor_limit().expect("it can be raised");
    rounds::<Inside>();
    eventually("every thread of every server is gone", || thread_states("mill-").is_empty().then_some(()));
}

/// What the rounds of a test came to.
#[derive(Debug, Default)]
struct Totals {
    rounds: u64,
    clean: u64,
    cut: u64,
    clients: u64,
    /// Of these, the ones that the machine kept from running, and of which less can be promised.
    stalled: u64,
    connections_cut: u64,
    bytes_in: u64,
    bytes_out: u64,
    scrapes: u64,
}

fn rounds<S: Subject>() {
    let number = |name: &str| -> Option<u64> {
        let value = std::env::var(name).ok()?;
        Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is no whole number")))
    };
    let rounds = number("MILLPOND_TORTURE_ROUNDS").unwrap_or(ROUNDS);
    let first = number("MILLPOND_TORTURE_SEED").unwrap_or_else(|| RandomState::new().hash_one(()) >> 32);
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let (totals, failures) = (Mutex::new(Totals::default()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(rounds) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let round = next.fetch_add(1, Ordering::Relaxed);
                    if round >= rounds {
                        break;
                    }
                    let seed = first + round;
                    let plan = Plan::draw(seed);
                    let played = catch_unwind(AssertUnwindSafe(|| play::<S>(&plan)));
                    match played.unwrap_or_else(|payload| Err(message(&*payload))) {
                        Ok(seen) => totals.lock().expect("no panic under it").add(&seen),
                        Err(wrong) => {
                            failed.store(true, Ordering::Relaxed);
                            failures.lock().expect("no panic under it").push(format!(
                                "{wrong}\n{:?}, signal {} at {:?}\nagain: MILLPOND_TORTURE_SEED={seed} MILLPOND_TORTURE_ROUNDS=1",
                                plan.server, plan.signal, plan.signal_at,
                            ));
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic under it");
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    let totals = totals.into_inner().expect("no panic under it");
    println!("from seed {first}: {totals:?}");
    assert!(rounds < MANY || totals.clean > rounds / 4 && totals.cut > rounds / 10, "{totals:?}");
}

impl Totals {
    fn add(&mut self, seen: &Seen) {
        self.rounds += 1;
        *if seen.report.cut == 0 { &mut self.clean } else { &mut self.cut } += 1;
        self.clients += seen.outcomes.len() as u64;
        self.stalled += seen.outcomes.iter().filter(|outcome| outcome.stalled).count() as u64;
        self.connections_cut += seen.report.cut;
        self.bytes_in += seen.report.bytes_in;
        self.bytes_out += seen.report.bytes_out;
        self.scrapes += seen.scrapes.len() as u64;
    }
}

/// What was seen of a round.
struct Seen {
    report: Report,
    /// The exit code, where there is a process.
    code: Option<i32>,
    outcomes: Vec<Outcome>,
    /// From the start to the end, in order.
    scrapes: Vec<Scrape>,
    /// When the server had stopped and its metrics still answered, if that can be had.
    last: Option<Scrape>,
}

/// Plays a round, and judges it.
fn play<S: Subject>(plan: &Plan) -> Result<Seen, String> {
    let mut subject = S::start(&plan.server);
    let first = Scrape::of(subject.metrics());
    let stage = Stage {
        address: subject.echo(),
        start: Instant::now(),
        signalled: AtomicBool::new(false),
        over: AtomicBool::new(false),
    };
    let watched = &AtomicBool::new(true);
    let (ended, scrapes, outcomes) = thread::scope(|scope| {
        let clients: Vec<_> = plan
            .clients
            .iter()
            .map(|script| client::spawn(scope, "client", || client::run(script, &stage)))
            .collect();
        let metrics = subject.metrics();
        let scraper = scope.spawn(move || scrape_all_the_while(metrics, watched, first));
        thread::sleep(plan.signal_at.saturating_sub(stage.start.elapsed()));
        stage.signalled.store(true, Ordering::SeqCst);
        // Whatever goes wrong, the threads must come home.
        let ended = catch_unwind(AssertUnwindSafe(|| {
            subject.signal(plan.signal);
            subject.ended()
        }));
        watched.store(false, Ordering::SeqCst);
        let seen = scraper.join();
        stage.over.store(true, Ordering::SeqCst);
        let outcomes: Vec<_> = clients.into_iter().map(ScopedJoinHandle::join).collect();
        let ended = ended.unwrap_or_else(|payload| resume_unwind(payload));
        let scrapes = seen.unwrap_or_else(|payload| resume_unwind(payload));
        (ended, scrapes, outcomes.into_iter().map(|outcome| outcome.expect("no client panics")).collect())
    });
    subject.close();
    let Ended { report, code, last } = ended;
    let seen = Seen { report, code, outcomes, scrapes, last };
    let wrong = seen.faults(plan);
    if wrong.is_empty() { Ok(seen) } else { Err(format!("{}\n{seen}", wrong.join("\n"))) }
}

/// Scrapes until told to stop, or until nobody answers. Fails if a law is broken or a counter falls.
fn scrape_all_the_while(address: SocketAddr, watched: &AtomicBool, first: Scrape) -> Vec<Scrape> {
    let mut scrapes = vec![first];
    while watched.load(Ordering::SeqCst) {
        let Ok(response) = try_http(address, "GET /metrics HTTP/1.1\r\nHost: torture\r\n\r\n") else { break };
        let length = response.header("Content-Length").and_then(|length| length.parse().ok());
        if length != Some(response.body.len()) {
            // The process ended under it.
            break;
        }
        let scrape = Scrape::parse(&response.body);
        assert_eq!(scrape.broken_law(), None, "{}", response.body);
        let fall = scrapes.last().and_then(|last| scrape.first_fall_since(last));
        assert_eq!(fall, None, "{}", response.body);
        scrapes.push(scrape);
        thread::sleep(Duration::from_millis(10));
    }
    scrapes
}

impl Seen {
    /// What is wrong with a round, if anything.
    fn faults(&self, plan: &Plan) -> Vec<String> {
        let Seen { report, outcomes, scrapes, .. } = self;
        let mut wrong = Vec::new();
        let mut check = |holds: bool, law: &str| {
            if !holds {
                wrong.push(format!("broken: {law}"));
            }
        };
        let clean = report.cut == 0;
        let lossy = plan.is_lossy();

        // The exit code and the report.
        check(
            self.code.is_none_or(|code| code == if clean { 0 } else { 3 }),
            "0 when nothing was cut, 3 when something was",
        );
        let Report { in_drain, served, closed_idle, failed, cut, accepted, bytes_in, bytes_out } = *report;
        check(in_drain == served + closed_idle + failed + cut, "every connection at the drain has one end");
        check(bytes_out <= bytes_in, "no more is sent than was read");
        check(!clean || lossy || bytes_in == bytes_out, "after a clean drain all that was read was sent");
        check(!clean || lossy || failed == 0, "no connection fails of which the client did nothing wrong");

        // What the clients have.
        let received: u64 = outcomes.iter().map(|outcome| outcome.received as u64).sum();
        // A worker that is at work when the rest is cut may have sent a buffer that it has not counted yet.
        let uncounted = if clean { 0 } else { plan.server.workers as u64 * BUFFER };
        check(received <= bytes_out + uncounted, "no client has what was not sent");
        let stalled = outcomes.iter().any(|outcome| outcome.stalled);
        check(
            !clean || lossy || stalled || received == bytes_in,
            "after a clean drain the clients have all that was read",
        );
        for outcome in outcomes {
            check(
                !matches!(outcome.end, End::Wrong(_)),
                "every byte is the right one, and every stream ends",
            );
        }
        // Who was let in and reads must have all that was sent before the signal, or is counted as cut. Where newcomers
        // may be refused, those without a byte may have been. Where a timeout is short, it may have closed a connection
        // before the drain, and the client may have spoken in the same moment. And one that the machine kept from
        // running was silent against its will.
        let timed = plan.server.idle_timeout.min(plan.server.write_timeout) < Duration::from_secs(1);
        let promised = outcomes.iter().filter(|outcome| {
            let refused = plan.refuses() && outcome.received == 0;
            outcome.in_time && !outcome.manner.loses() && !refused && !outcome.stalled && !timed
        });
        let short = promised.clone().filter(|outcome| outcome.received < outcome.sent_before).count() as u64;
        check(short <= cut, "whoever did not get all that was sent before the signal is counted as cut");
        let reset = promised.filter(|outcome| outcome.end != End::Whole).count() as u64;
        check(reset <= cut, "whoever was reset is counted as cut");

        // The accounts.
        let knocked =
            outcomes.iter().filter(|outcome| outcome.manner == Manner::ComesLate || outcome.connected);
        let heard = outcomes.iter().filter(|outcome| outcome.received > 0);
        check(accepted <= knocked.count() as u64, "no more are accepted than came");
        check(accepted >= heard.count() as u64, "whoever was answered was accepted");
        let totals = |scrape: &Scrape| {
            ["connections_accepted_total", "received_bytes_total", "sent_bytes_total"]
                .map(|name| whole(scrape.get(name)))
        };
        let final_totals = [accepted, bytes_in, bytes_out];
        if let Some(scrape) = scrapes.last() {
            let at_most = totals(scrape).iter().zip(final_totals).all(|(seen, last)| *seen <= last);
            check(!clean || at_most, "the last scrape shows no more than the report");
        }
        if let Some(scrape) = &self.last {
            let same = totals(scrape) == final_totals;
            check(!clean || same, "the scrape after the end shows what the report does");
            check(scrape.get("phase{phase=\"stopped\"}") == 1.0, "the phase is stopped at the end");
        }
        // A scrape takes a while, in which the drain may begin: its neighbour tells on which side of that it was.
        let drains = |scrape: &Scrape| scrape.sum("phase", "draining") + scrape.sum("phase", "stopped") > 0.0;
        let closed = |scrape: &Scrape| whole(scrape.sum("connections_closed_total", "reason="));
        let before = scrapes.windows(2).filter(|pair| !drains(&pair[1])).map(|pair| closed(&pair[0])).max();
        let after = scrapes.windows(2).filter(|pair| drains(&pair[0])).map(|pair| closed(&pair[1])).min();
        check(
            before.is_none_or(|before| before + in_drain <= accepted + cut),
            "who was gone before the drain is not in it",
        );
        check(after.is_none_or(|after| accepted <= after + in_drain), "who was there at the drain is in it");
        wrong
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a counter is a whole number, and not negative"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "exit code {:?}, {:?}, {} scrapes", self.code, self.report, self.scrapes.len())?;
        self.outcomes.iter().try_for_each(|outcome| writeln!(f, "{outcome:?}"))
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic").to_owned()
}
