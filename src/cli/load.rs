//! `millpond load`: flags to a plan, and a run of it with progress, signals and an exit code.
//!
//! Parsing only validates, as in `config`. The program checks that the system allows enough descriptors and ports
//! before it opens the first connection.

use std::ffi::OsString;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Parser;
use clap::builder::Styles;
use millpond::{RESERVED_DESCRIPTORS, raise_descriptor_limit};

use super::config::{address, duration, positive, said, whole};
use super::signals::{self, Notice};
use super::{ABANDONED, FAILED, fail, print, summary};
use crate::load::{self, Plan, Progress, Until};

/// Sizes of messages.
const SIZES: RangeInclusive<u64> = 1..=16 * 1024 * 1024;

/// Enough for any machine. The number of descriptors is a lower limit on most.
const MAX_CONNECTIONS: usize = 1_000_000;

/// Messages that may be on their way on one connection.
const MAX_PIPELINE: usize = 10_000;

/// Threads by default. One thread sends about a hundred thousand messages a second, and a server on the same machine
/// needs processors too.
const THREADS: usize = 2;

const ABOUT: &str = "Sends messages to an echo service, and checks every byte that comes back";

const LONG_ABOUT: &str = "\
Sends messages to an echo service, and checks every byte that comes back. It sees lost, repeated, moved, changed and foreign \
bytes, and reports each with the connection and the offset.

Each connection sends its next message when the last is back. With --rate it sends when the message is due, and the latency \
counts from that time, even if the message is sent late. A message that is never answered counts as waiting to the end of the \
run, so its latency is at least that long. This is a load generator: aim it at your own services only.";

const AFTER_HELP: &str = "\
Durations are numbers with units: 250ms, 30s, 5m. Sizes are bytes, or with units: 64KiB.

SIGINT (Ctrl-C), SIGTERM or SIGHUP ends the run early, with its report. Signals within 1 s of the first belong to it, and \
a later one ends the run at once.

Exit codes: 0 every message that was due was answered, every byte was right, and nothing failed; 1 something failed, a \
message was overdue, no message was answered, it could not start, or the report could not be written; 2 usage; 130 a \
signal 1 s or more after the first ended it at once.";

/// The flags of `millpond load`.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "millpond load",
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = AFTER_HELP,
    override_usage = "millpond load ADDR [FLAGS]",
    styles = Styles::plain(),
    max_term_width = 100,
    args_override_self = true,
    disable_help_flag = true
)]
pub(crate) struct Flags {
    /// The echo service, such as 127.0.0.1:15000
    #[arg(value_name = "ADDR", value_parser = address)]
    address: SocketAddr,

    /// Connections that send messages
    #[arg(short, long, value_name = "N", default_value = "50", help_heading = "Load")]
    #[arg(value_parser = whole::<1, MAX_CONNECTIONS>)]
    connections: usize,

    /// Bytes of a message, 1 to 16MiB; or a range such as 64..4096, its ends included
    #[arg(long, value_name = "BYTES", default_value = "512", help_heading = "Load", value_parser = sizes)]
    size: Sizes,

    /// Messages on their way at a time on each connection
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Load")]
    #[arg(value_parser = whole::<1, MAX_PIPELINE>)]
    pipeline: usize,

    /// Messages due in a second, over all connections [default: as fast as answers come]
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = whole::<1, 10_000_000>)]
    rate: Option<usize>,

    /// A new connection for every message, its time included in the message's
    #[arg(long, help_heading = "Load", conflicts_with = "pipeline")]
    churn: bool,

    /// Further connections, which are opened first and stay silent
    #[arg(long, value_name = "N", default_value = "0", help_heading = "Load")]
    #[arg(value_parser = whole::<0, MAX_CONNECTIONS>)]
    idle: usize,

    /// How long to send
    #[arg(long, value_name = "DUR", default_value = "10s", help_heading = "Length", value_parser = positive)]
    duration: Duration,

    /// How many messages to send in all, instead of a duration
    #[arg(long, value_name = "N", help_heading = "Length", conflicts_with = "duration")]
    #[arg(value_parser = whole::<1, 1_000_000_000_000_000>)]
    count: Option<usize>,

    /// At the start, send for this long without counting
    #[arg(long, value_name = "DUR", default_value = "0s", help_heading = "Length", value_parser = duration)]
    warmup: Duration,

    /// A connection not made, or silent while an answer is wanted, for this long has failed
    #[arg(long, value_name = "DUR", default_value = "30s", help_heading = "Length", value_parser = positive)]
    timeout: Duration,

    /// Threads that send and check [default: 2, or 1 on a single processor]
    #[arg(long, value_name = "N", help_heading = "Other", value_parser = whole::<1, 256>)]
    threads: Option<usize>,

    /// Decides sizes and bytes, to repeat a run [default: random, and reported]
    #[arg(long, value_name = "N", help_heading = "Other", value_parser = whole::<0, { u32::MAX as usize }>)]
    seed: Option<usize>,

    /// Report one JSON object instead of a table
    #[arg(long, help_heading = "Other")]
    json: bool,

    /// Print this help; -h prints a shorter one
    #[arg(short, long, help_heading = "Other", action = clap::ArgAction::Help)]
    help: Option<bool>,
}

/// The value of `--size`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sizes(RangeInclusive<u64>);

fn sizes(text: &str) -> Result<Sizes, String> {
    let size = |text: &str| text.parse().ok().filter(|ByteSize(bytes)| SIZES.contains(bytes));
    let (least, most) = text.split_once("..").unwrap_or((text, text));
    match (size(least), size(most)) {
        (Some(ByteSize(least)), Some(ByteSize(most))) if least <= most => Ok(Sizes(least..=most)),
        _ => Err("give a size from 1 to 16MiB, such as 512, or a range of them, such as 64..4KiB".to_owned()),
    }
}

impl Flags {
    pub(super) fn plan(&self) -> Plan {
        let processors = available_parallelism().map_or(1, usize::from);
        // Short enough for a person to type, and for JSON readers that keep numbers as floats.
        let random = || RandomState::new().build_hasher().finish() % (1 << 32);
        Plan {
            address: self.address,
            connections: self.connections,
            sizes: self.size.0.clone(),
            until: self.count.map_or(Until::Time(self.duration), |count| Until::Count(count as u64)),
            warmup: self.warmup,
            pipeline: self.pipeline,
            churn: self.churn,
            idle: self.idle,
            rate: self.rate.map(|rate| rate as u64),
            timeout: self.timeout,
            threads: self.threads.unwrap_or(THREADS.min(processors)).min(self.connections),
            seed: self.seed.map_or_else(random, |seed| seed as u64),
        }
    }
}

/// Parses what follows `load` on the command line. If it printed help or an error, it returns the exit code as `Err`.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Flags, ExitCode> {
    let args = std::iter::once(OsString::from("millpond load")).chain(args);
    Flags::try_parse_from(args).map_err(|error| said(&error, "see millpond load --help"))
}

/// Runs to the end, and reports.
pub(crate) fn run(flags: &Flags) -> ExitCode {
    let plan = flags.plan();
    let limit = match raise_descriptor_limit() {
        Ok(limit) => limit,
        Err(error) => {
            return fail(FAILED, format_args!("the limit on open files cannot be raised: {error}"));
        }
    };
    if let Err(why) = enough_descriptors(&plan, limit).and_then(|()| enough_ports(&plan, load::local_ports()))
    {
        return fail(FAILED, why);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    let caught = signals::catch(move |notice| match notice {
        Notice::Stop => asked.store(true, Ordering::Relaxed),
        // There is no log that could mention it.
        Notice::Repeat { .. } => {}
        Notice::Abandon => std::process::exit(ABANDONED.into()),
    });
    if let Err(error) = caught {
        return fail(FAILED, format_args!("signals cannot be caught: {error}"));
    }

    let mut meter = Meter::new();
    let outcome = load::run(&plan, &stop, |progress| meter.show(&progress));
    meter.clear();
    let report = match outcome {
        Ok(report) => report,
        Err(error) => return fail(FAILED, format_args!("the load cannot be made: {error}")),
    };
    let text = if flags.json {
        summary::json(&plan, &report, stop.load(Ordering::Relaxed))
    } else {
        summary::table(&plan, &report, stop.load(Ordering::Relaxed))
    };
    if let Err(error) = print(&text) {
        return fail(FAILED, format_args!("the report cannot be written to standard output: {error}"));
    }
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

fn enough_descriptors(plan: &Plan, limit: u64) -> Result<(), String> {
    let all = (plan.connections + plan.idle) as u64;
    let most = limit.saturating_sub(RESERVED_DESCRIPTORS);
    if all <= most {
        return Ok(());
    }
    Err(format!(
        "--connections and --idle: {all} connections are more than the {most} that the limit of {limit} open files \
         leaves room for; give fewer, or raise the limit (ulimit -n)"
    ))
}

fn enough_ports(plan: &Plan, ports: usize) -> Result<(), String> {
    let all = plan.connections + plan.idle;
    if all <= ports || plan.address.ip().to_canonical().is_loopback() && plan.address.is_ipv4() {
        return Ok(());
    }
    Err(format!(
        "--connections and --idle: {all} connections to {} are more than the {ports} local ports; give fewer, or \
         widen net.ipv4.ip_local_port_range",
        plan.address,
    ))
}

/// The progress line, on a terminal only.
struct Meter {
    on: bool,
    last: u64,
    shown: bool,
}

impl Meter {
    fn new() -> Self {
        Meter { on: io::stderr().is_terminal(), last: 0, shown: false }
    }

    fn show(&mut self, progress: &Progress) {
        if !self.on {
            return;
        }
        let fresh = progress.messages.saturating_sub(self.last);
        self.last = progress.messages;
        self.shown = true;
        // Goes back to the start of the line, and clears what is left of the last one.
        let _ = write!(
            io::stderr(),
            "\r{:.0} s: {fresh} messages in the last second, {} connections open, {} errors\x1b[K",
            progress.elapsed.as_secs_f64(),
            progress.open,
            progress.failures,
        );
    }

    fn clear(&self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::assert_takes;
    use super::super::config::one_line;
    use super::*;

    fn parsed(args: &[&str]) -> Result<Plan, String> {
        let args = ["millpond load", "127.0.0.1:7"].iter().chain(args);
        let flags = Flags::try_parse_from(args);
        flags.map(|flags| flags.plan()).map_err(|error| one_line(&error.render().to_string(), "see"))
    }

    #[test]
    fn the_defaults_are_those_of_the_documentation() {
        let plan = parsed(&[]).expect("defaults");
        assert_eq!((plan.connections, plan.sizes, plan.pipeline, plan.idle), (50, 512..=512, 1, 0));
        assert_eq!((plan.until, plan.warmup), (Until::Time(Duration::from_secs(10)), Duration::ZERO));
        assert_eq!((plan.rate, plan.churn, plan.timeout), (None, false, Duration::from_secs(30)));
        assert!((1..=THREADS).contains(&plan.threads));
    }

    #[test]
    fn both_ends_of_each_range_are_allowed_and_nothing_beyond() {
        for (flag, good, bad) in [
            ("--connections", ["1", "1000000"], ["0", "1000001"]),
            ("--idle", ["0", "1000000"], ["-1", "1000001"]),
            ("--size", ["1", "16MiB"], ["0", "16777217"]),
            ("--size", ["64..4096", "1..16MiB"], ["4096..64", "0..5"]),
            ("--size", ["5..5", "1KiB..2KiB"], ["5..", "..5"]),
            ("--pipeline", ["1", "10000"], ["0", "10001"]),
            ("--rate", ["1", "10000000"], ["0", "1.5"]),
            ("--duration", ["1ms", "365d"], ["0s", "5"]),
            ("--count", ["1", "1000000000000000"], ["0", "1000000000000001"]),
            ("--warmup", ["0s", "1h"], ["366d", "soon"]),
            ("--timeout", ["1ms", "1h"], ["0s", "366d"]),
            ("--threads", ["1", "256"], ["0", "257"]),
            ("--seed", ["0", "4294967295"], ["-1", "4294967296"]),
        ] {
            assert_takes(flag, good, bad, parsed);
        }
    }

    #[test]
    fn no_more_threads_than_connections() {
        assert_eq!(parsed(&["-c", "3", "--threads", "8"]).expect("a plan").threads, 3);
    }

    #[test]
    fn what_the_system_must_allow_is_known_beforehand() {
        let plan = parsed(&["-c", "900", "--idle", "100"]).expect("a plan");
        assert_eq!(enough_descriptors(&plan, 1064), Ok(()));
        let message = enough_descriptors(&plan, 1063).expect_err("one too few");
        assert!(message.contains("1000 connections") && message.contains("ulimit -n"), "{message}");
        assert_eq!(enough_ports(&plan, 999), Ok(()), "there are many loopback addresses");
        let elsewhere = Plan { address: "192.0.2.1:7".parse().expect("an address"), ..plan };
        assert_eq!(enough_ports(&elsewhere, 1000), Ok(()));
        let message = enough_ports(&elsewhere, 999).expect_err("one too few");
        assert!(message.contains("192.0.2.1:7") && message.contains("ip_local_port_range"), "{message}");
    }
}
