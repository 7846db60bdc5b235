//! Turns flags and their environment variables into a validated [`Config`].
//!
//! Parsing only validates: it binds nothing, starts nothing, and reads no limit of the system, so `--help` always works. It
//! checks every flag's range. A mistake is reported in one line that names the flag and the remedy.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::builder::{FalseyValueParser, Styles};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use millpond::{MAX_WORKERS, Overload};

use super::{FAILED, USAGE};

/// The longest duration of a flag. It is longer than any sensible timeout, and no sum of such times overflows.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// The longest time that simulated work may hold a worker.
const LONGEST_WORK: Duration = Duration::from_secs(3600);

/// The longest host name that DNS allows.
const LONGEST_NAME: usize = 253;

/// The sizes of a worker's stack in bytes. With less, a thread may not start; no service needs more.
const STACK_SIZES: std::ops::RangeInclusive<u64> = 64 * 1024..=1024 * 1024 * 1024;

const ABOUT: &str = "An echo server whose worker pool shows its own saturation";

const LONG_ABOUT: &str = "\
An echo server whose bounded worker pool shows its own saturation as Prometheus metrics on a side HTTP port, and which \
drains gracefully on Ctrl-C.

Clients that are silent cost no worker: 128 workers serve any number of connections up to the limit. Metrics are at \
/metrics on the address of --metrics, with /healthz and /readyz beside them.";

const AFTER_HELP: &str = "\
Durations are numbers with units: 250ms, 30s, 5m, 1h30m. Each flag can be set in the environment too, as MILLPOND_ and \
the flag's name in capitals with _ for -: MILLPOND_IDLE_TIMEOUT=1m. A flag given wins.

SIGINT (Ctrl-C), SIGTERM or SIGHUP begins the drain. Signals within 1 s of the first belong to it, since many programs \
send one stop as two. A later one abandons at once.

`millpond load ADDR` is another command: it sends messages to an echo service and checks every byte that comes back. \
See millpond load --help. `millpond health ADDR` asks a millpond whether it is well, for health checks that run a program. \
See millpond health --help.

Exit codes: 0 drained clean; 1 could not start, or failed; 2 usage; 3 something was cut in the drain; \
130 abandoned by a signal 1 s or more after the first.";

/// The flags of the server.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "millpond",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = AFTER_HELP,
    override_usage = "millpond [serve] [FLAGS]\n       millpond load ADDR [FLAGS]\n       millpond health [ADDR] [FLAGS]",
    styles = Styles::plain(),
    max_term_width = 100,
    args_override_self = true,
    disable_help_flag = true,
    disable_version_flag = true
)]
pub(crate) struct Config {
    /// Where to echo; port 0 picks a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15000", help_heading = "Addresses")]
    #[arg(env = "MILLPOND_LISTEN", hide_env_values = true, value_parser = address)]
    pub(crate) listen: SocketAddr,

    /// Where to serve /metrics, /healthz and /readyz over HTTP; port 0 picks a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9464", help_heading = "Addresses")]
    #[arg(env = "MILLPOND_METRICS", hide_env_values = true, value_parser = address)]
    pub(crate) metrics: SocketAddr,

    /// Also show the status page under this host name, besides IP addresses and localhost; may be repeated, or be a
    /// list with commas
    #[arg(long, value_name = "NAME", value_delimiter = ',', help_heading = "Addresses")]
    #[arg(env = "MILLPOND_STATUS_HOST", hide_env_values = true, value_parser = host_name)]
    pub(crate) status_host: Vec<String>,

    /// Connections the kernel keeps until they are accepted; a warning says if net.core.somaxconn cuts it
    #[arg(long, value_name = "N", default_value = "4096", help_heading = "Addresses")]
    #[arg(env = "MILLPOND_BACKLOG", hide_env_values = true, value_parser = whole::<1, 65_535>)]
    pub(crate) backlog: usize,

    /// Worker threads, 1 to 10000
    #[arg(long, value_name = "N", default_value = "128", help_heading = "Pool")]
    #[arg(env = "MILLPOND_WORKERS", hide_env_values = true, value_parser = whole::<1, MAX_WORKERS>)]
    pub(crate) workers: usize,

    /// Stack of each worker, 64KiB to 1GiB
    #[arg(long, value_name = "BYTES", default_value = "256KiB", help_heading = "Pool")]
    #[arg(env = "MILLPOND_STACK_SIZE", hide_env_values = true, value_parser = stack_size)]
    pub(crate) stack_size: usize,

    /// Hold the worker this long for every message, to try saturation on purpose, up to 1h
    #[arg(long, value_name = "DUR", default_value = "0s", help_heading = "Pool")]
    #[arg(env = "MILLPOND_WORK", hide_env_values = true, value_parser = work)]
    pub(crate) work: Duration,

    /// Most open connections [default: what the limit on open files allows, less a reserve, up to 65536]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    #[arg(env = "MILLPOND_MAX_CONNECTIONS", hide_env_values = true, value_parser = whole::<1, 10_000_000>)]
    pub(crate) max_connections: Option<usize>,

    /// Overloaded while the connection that has waited longest for a worker is older than this [default:
    /// never]
    #[arg(long, value_name = "DUR", help_heading = "Limits")]
    #[arg(env = "MILLPOND_MAX_QUEUE_WAIT", hide_env_values = true, value_parser = positive)]
    pub(crate) max_queue_wait: Option<Duration>,

    /// At the connection limit or when overloaded: let new connections wait in the kernel, or accept and close them
    #[arg(long, value_name = "POLICY", default_value = "wait", help_heading = "Limits")]
    #[arg(env = "MILLPOND_OVERLOAD", hide_env_values = true, value_enum)]
    pub(crate) overload: OverloadArg,

    /// Close a connection that is silent for this long; 0 is never
    #[arg(long, value_name = "DUR", default_value = "5m", help_heading = "Limits")]
    #[arg(env = "MILLPOND_IDLE_TIMEOUT", hide_env_values = true, value_parser = duration)]
    pub(crate) idle_timeout: Duration,

    /// Probe a client that is silent for this long, and close its connection when it has vanished; 0 is never
    ///
    /// The kernel sends five probes, a fifth of the time apart, so a vanished client is found after about twice the time.
    /// It counts in seconds, and takes 1 s to 32767 s: a longer time means that.
    #[arg(long, value_name = "DUR", default_value = "2m", help_heading = "Limits")]
    #[arg(env = "MILLPOND_KEEPALIVE", hide_env_values = true, value_parser = duration)]
    pub(crate) keepalive: Duration,

    /// Close a connection whose client takes none of its output for this long
    #[arg(long, value_name = "DUR", default_value = "30s", help_heading = "Limits")]
    #[arg(env = "MILLPOND_WRITE_TIMEOUT", hide_env_values = true, value_parser = positive)]
    pub(crate) write_timeout: Duration,

    /// After the signal, keep accepting for this long while /readyz already says no
    #[arg(long, value_name = "DUR", default_value = "0s", help_heading = "Drain")]
    #[arg(env = "MILLPOND_LAME_DUCK", hide_env_values = true, value_parser = duration)]
    pub(crate) lame_duck: Duration,

    /// Close connections that are still open this long after the drain began
    #[arg(long, value_name = "DUR", default_value = "30s", help_heading = "Drain")]
    #[arg(env = "MILLPOND_DRAIN_TIMEOUT", hide_env_values = true, value_parser = duration)]
    pub(crate) drain_timeout: Duration,

    /// How to write the log, on standard error
    #[arg(long, value_name = "FORMAT", default_value = "text", help_heading = "Log")]
    #[arg(env = "MILLPOND_LOG", hide_env_values = true, value_enum)]
    pub(crate) log: LogFormat,

    /// Log every connection too
    #[arg(short, long, help_heading = "Log")]
    #[arg(env = "MILLPOND_VERBOSE", hide_env_values = true, value_parser = FalseyValueParser::new())]
    pub(crate) verbose: bool,

    /// Log only warnings and errors
    #[arg(short, long, help_heading = "Log")]
    #[arg(env = "MILLPOND_QUIET", hide_env_values = true, value_parser = FalseyValueParser::new())]
    pub(crate) quiet: bool,

    /// Print this help; -h prints a shorter one
    #[arg(short, long, help_heading = "Help", action = clap::ArgAction::Help)]
    help: Option<bool>,

    /// Print the version
    #[arg(short = 'V', long, help_heading = "Help", action = clap::ArgAction::Version)]
    version: Option<bool>,
}

/// The values of `--overload`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OverloadArg {
    /// Stop accepting; new connections wait in the kernel's listen queue.
    Wait,
    /// Accept and close new connections, counted by reason.
    Reject,
}

impl From<OverloadArg> for Overload {
    fn from(policy: OverloadArg) -> Self {
        match policy {
            OverloadArg::Wait => Overload::Wait,
            OverloadArg::Reject => Overload::Reject,
        }
    }
}

/// The values of `--log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// A line for a person.
    Text,
    /// A JSON object a line.
    Json,
}

/// Parses the command line. Prints help or names a mistake, and then `Err` is the exit code.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Config, ExitCode> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    // `serve` runs also if no command is named, so its name changes nothing.
    if args.get(1).is_some_and(|command| command == "serve") {
        args.remove(1);
    }
    from(args).map_err(|error| said(&error, "see --help"))
}

/// Prints help, or names a mistake and says where to look. Returns the exit code.
pub(super) fn said(error: &clap::Error, look: &str) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            match super::print(&error.render().to_string()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => super::fail(FAILED, format_args!("standard output cannot be written: {error}")),
            }
        }
        _ => super::fail(USAGE, one_line(&error.render().to_string(), look)),
    }
}

/// As `Config::try_parse_from`. If both `--verbose` and `--quiet` are given, the last one wins, also over the environment.
pub(super) fn from(
    args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Config, clap::Error> {
    let matches = Config::command().try_get_matches_from(args)?;
    let mut config = Config::from_arg_matches(&matches)?;
    // A flag's place on the command line. `None`, for a flag that is not there, is less than any place.
    let place = |flag| match matches.value_source(flag) {
        Some(ValueSource::CommandLine) => matches.index_of(flag),
        _ => None,
    };
    if config.verbose && config.quiet {
        config.quiet = place("quiet") > place("verbose");
        config.verbose = !config.quiet;
    }
    Ok(config)
}

/// Puts a message of clap's on one line: the mistake, then clap's tips, then where to look.
pub(super) fn one_line(message: &str, look: &str) -> String {
    let mut lines: Vec<&str> = message
        .lines()
        .map(str::trim)
        // The usage follows the mistake, and has several lines if there are several commands.
        .take_while(|line| !line.starts_with("Usage:"))
        .filter(|line| !line.is_empty() && !line.starts_with("For more information"))
        .collect();
    lines.push(look);
    let line = lines.join("; ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    SocketAddr::from_str(text)
        .map_err(|_| "give an IP address and a port, such as 127.0.0.1:15000 or [::1]:0".to_owned())
}

fn host_name(text: &str) -> Result<String, String> {
    let part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if text.is_empty() || text.len() > LONGEST_NAME || !text.bytes().all(part) {
        return Err("give a host name without scheme and port, such as pond.example.org".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn whole<const LEAST: usize, const MOST: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (LEAST..=MOST).contains(&number) => Ok(number),
        _ => Err(format!("give a whole number from {LEAST} to {MOST}")),
    }
}

fn stack_size(text: &str) -> Result<usize, String> {
    match text.parse::<ByteSize>() {
        Ok(ByteSize(bytes)) if STACK_SIZES.contains(&bytes) => {
            usize::try_from(bytes).map_err(|error| error.to_string())
        }
        _ => Err("give a size from 64KiB to 1GiB, such as 256KiB".to_owned()),
    }
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    up_to(LONGEST, text)
}

fn work(text: &str) -> Result<Duration, String> {
    up_to(LONGEST_WORK, text)
}

pub(super) fn positive(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("give a duration above 0, such as 250ms or 30s".to_owned()),
        duration => Ok(duration),
    }
}

fn up_to(longest: Duration, text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= longest => Ok(duration),
        Ok(_) => Err(format!("give at most {}", humantime::format_duration(longest))),
        Err(_) => Err("give a number with a unit, such as 250ms, 30s or 5m".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::assert_takes;
    use super::*;

    fn parsed(args: &[&str]) -> Result<Config, String> {
        let args = ["millpond"].iter().chain(args);
        from(args.copied()).map_err(|error| one_line(&error.render().to_string(), "see --help"))
    }

    #[test]
    fn the_defaults_are_those_of_the_documentation() {
        let config = parsed(&[]).expect("defaults");
        assert_eq!(config.listen, ([127, 0, 0, 1], 15000).into());
        assert_eq!(config.metrics, ([127, 0, 0, 1], 9464).into());
        assert_eq!((config.workers, config.stack_size, config.backlog), (128, 256 * 1024, 4096));
        assert_eq!((config.max_connections, config.max_queue_wait), (None, None));
        assert_eq!(config.overload, OverloadArg::Wait);
        let seconds =
            [config.idle_timeout, config.write_timeout, config.lame_duck, config.drain_timeout, config.work]
                .map(|duration| duration.as_secs());
        assert_eq!(seconds, [300, 30, 0, 30, 0]);
        assert_eq!(config.keepalive, millpond::DEFAULT_KEEPALIVE);
        assert_eq!((config.log, config.verbose, config.quiet), (LogFormat::Text, false, false));
        let window = format!("within {:?} of the first", super::super::signals::ONE_STOP);
        assert!(AFTER_HELP.replace("1 s", "1s").contains(&window), "{window}");
    }

    #[test]
    fn both_ends_of_each_range_are_allowed_and_nothing_beyond() {
        for (flag, good, bad) in [
            ("--workers", ["1", "10000"], ["0", "10001"]),
            ("--backlog", ["1", "65535"], ["0", "65536"]),
            ("--max-connections", ["1", "10000000"], ["0", "10000001"]),
            ("--stack-size", ["64KiB", "1GiB"], ["65535", "1073741825"]),
            ("--work", ["0s", "1h"], ["3600001ms", "-1s"]),
            ("--max-queue-wait", ["1ns", "365d"], ["0s", "366d"]),
            ("--write-timeout", ["1ms", "365d"], ["0s", "soon"]),
            ("--idle-timeout", ["0", "365d"], ["5", "366d"]),
            ("--keepalive", ["0", "365d"], ["2", "366d"]),
            ("--drain-timeout", ["0s", "365d"], ["", "366d"]),
            ("--listen", ["[::1]:0", "0.0.0.0:65535"], ["localhost:1", "127.0.0.1"]),
            ("--overload", ["wait", "reject"], ["evict", "Wait"]),
            ("--log", ["text", "json"], ["xml", ""]),
            ("--status-host", ["pond.example.org", "a_b-c.,localhost"], ["http://pond", "pond:9464"]),
            ("--status-host", ["xn--bcher-kva.example", &"a".repeat(253)], ["", &"a".repeat(254)]),
        ] {
            assert_takes(flag, good, bad, parsed);
        }
    }

    #[test]
    fn status_hosts_may_be_repeated_and_listed_with_commas() {
        let hosts = |args: &[&str]| parsed(args).map(|config| config.status_host);
        assert_eq!(hosts(&[]), Ok(vec![]));
        let args = ["--status-host", "a.example,b.example", "--workers=3", "--status-host=c.example"];
        assert_eq!(hosts(&args), Ok(["a.example", "b.example", "c.example"].map(str::to_owned).into()));
        for wrong in ["a.example,", "a.example,,b.example", "a.example, b.example"] {
            let message = hosts(&["--status-host", wrong]).expect_err("no host name");
            assert!(
                message.contains("--status-host") && message.contains("without scheme and port"),
                "{message}"
            );
        }
    }

    #[test]
    fn of_two_opposites_the_last_one_wins() {
        let loudness = |args: &[&str]| parsed(args).map(|config| (config.verbose, config.quiet));
        assert_eq!(loudness(&["-v"]), Ok((true, false)));
        assert_eq!(loudness(&["-v", "-q"]), Ok((false, true)));
        assert_eq!(loudness(&["-q", "--verbose"]), Ok((true, false)));
        assert_eq!(loudness(&["-q", "-v", "-q"]), Ok((false, true)));
    }

    #[test]
    fn a_misspelt_flag_is_named_with_the_likely_one() {
        let message = parsed(&["--worker", "3"]).expect_err("no such flag");
        assert!(message.contains("'--worker'") && message.contains("'--workers'"), "{message}");
        assert!(!message.contains("millpond load"), "the usage of another command: {message}");
    }
}
