//! Properties that hold for any command line.
//!
//! [`check_serve`], [`check_load`] and [`check_health`] assert them for one command line. The tests below generate some
//! thousands of command lines, and the fuzzer in `fuzz/` any number. This module is built for these two only.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Parser, ValueEnum};
use humantime::format_duration;

use super::config::{self, Config, one_line};
use super::health;
use super::load::Flags;
use crate::load::{Plan, Until};

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
const HOUR: Duration = Duration::from_secs(3600);

/// The address for `millpond load`, in tests of its other arguments.
pub(crate) const ADDRESS: &str = "127.0.0.1:7";

/// Flags of the server with a value. The message about a wrong value names its flag.
const SERVE_FLAGS: [&str; 14] = [
    "--listen",
    "--metrics",
    "--status-host",
    "--backlog",
    "--workers",
    "--stack-size",
    "--work",
    "--max-connections",
    "--max-queue-wait",
    "--overload",
    "--idle-timeout",
    "--keepalive",
    "--drain-timeout",
    "--log",
];

/// Flags of the load generator with a value.
const LOAD_FLAGS: [&str; 11] = [
    "--connections",
    "--size",
    "--pipeline",
    "--rate",
    "--idle",
    "--duration",
    "--count",
    "--warmup",
    "--timeout",
    "--threads",
    "--seed",
];

/// Flags of the health check with a value.
const HEALTH_FLAGS: [&str; 1] = ["--timeout"];

/// Asserts the properties for these flags of the server. If they are accepted, each value is within its range, and the flags
/// printed from the result give the same result. If not, one line says why.
///
/// # Panics
///
/// If a property does not hold.
pub(crate) fn check_serve(flags: &[OsString]) {
    let parse = |flags: &[OsString]| config::from([OsString::from("millpond")].iter().chain(flags));
    match parse(flags) {
        Ok(config) => {
            assert!((1..=10_000).contains(&config.workers), "{config:?}");
            assert!((1..=65_535).contains(&config.backlog), "{config:?}");
            assert!((64 * 1024..=1 << 30).contains(&config.stack_size), "{config:?}");
            assert!(config.max_connections.is_none_or(|most| (1..=10_000_000).contains(&most)), "{config:?}");
            assert!(config.work <= HOUR, "{config:?}");
            let waits = [config.idle_timeout, config.keepalive, config.lame_duck, config.drain_timeout];
            assert!(waits.iter().all(|wait| *wait <= YEAR), "{config:?}");
            let positive = [Some(config.write_timeout), config.max_queue_wait];
            let above_zero = |wait: &Duration| !wait.is_zero() && *wait <= YEAR;
            assert!(positive.iter().flatten().all(above_zero), "{config:?}");
            let again = parse(&printed(&config)).unwrap_or_else(|error| panic!("{config:?}: {error}"));
            assert_eq!(format!("{again:?}"), format!("{config:?}"));
        }
        Err(error) => said_in_one_line(&error, flags, &SERVE_FLAGS),
    }
}

/// As [`check_serve`], for what follows `millpond load`.
///
/// # Panics
///
/// If a property does not hold.
pub(crate) fn check_load(flags: &[OsString]) {
    let parse = |flags: &[OsString]| {
        Flags::try_parse_from([OsString::from("millpond load")].iter().chain(flags)).map(|flags| flags.plan())
    };
    match parse(flags) {
        Ok(plan) => {
            assert!((1..=1_000_000).contains(&plan.connections) && plan.idle <= 1_000_000, "{plan:?}");
            assert!(*plan.sizes.start() >= 1 && plan.sizes.start() <= plan.sizes.end(), "{plan:?}");
            assert!(*plan.sizes.end() <= 16 * 1024 * 1024, "{plan:?}");
            assert!((1..=10_000).contains(&plan.pipeline), "{plan:?}");
            assert!(plan.rate.is_none_or(|rate| (1..=10_000_000).contains(&rate)), "{plan:?}");
            assert!((1..=plan.connections.min(256)).contains(&plan.threads), "{plan:?}");
            assert!(!plan.timeout.is_zero() && plan.timeout <= YEAR && plan.warmup <= YEAR, "{plan:?}");
            assert!(u32::try_from(plan.seed).is_ok(), "{plan:?}");
            let ends = match plan.until {
                Until::Time(duration) => !duration.is_zero() && duration <= YEAR,
                Until::Count(count) => (1..=1_000_000_000_000_000).contains(&count),
            };
            assert!(ends, "{plan:?}");
            let again = parse(&printed_plan(&plan)).unwrap_or_else(|error| panic!("{plan:?}: {error}"));
            assert_eq!(format!("{again:?}"), format!("{plan:?}"));
        }
        Err(error) => said_in_one_line(&error, flags, &LOAD_FLAGS),
    }
}

/// As [`check_serve`], for what follows `millpond health`.
///
/// # Panics
///
/// If a property does not hold.
pub(crate) fn check_health(flags: &[OsString]) {
    let parse = |flags: &[OsString]| {
        health::Flags::try_parse_from([OsString::from("millpond health")].iter().chain(flags))
    };
    match parse(flags) {
        Ok(asked) => {
            assert!(asked.address.port() != 0, "{asked:?}");
            assert!(!asked.timeout.is_zero() && asked.timeout <= YEAR, "{asked:?}");
            let mut printed =
                vec![asked.address.to_string(), format!("--timeout={}", format_duration(asked.timeout))];
            printed.extend(asked.ready.then(|| "--ready".to_owned()));
            let printed: Vec<OsString> = printed.into_iter().map(OsString::from).collect();
            let again = parse(&printed).unwrap_or_else(|error| panic!("{asked:?}: {error}"));
            assert_eq!(format!("{again:?}"), format!("{asked:?}"));
        }
        Err(error) => said_in_one_line(&error, flags, &HEALTH_FLAGS),
    }
}

/// Calls [`check_load`] if the first line is `load`, [`check_health`] if it is `health`, and otherwise [`check_serve`]. Each
/// further line is an argument.
///
/// # Panics
///
/// If a property does not hold.
pub(crate) fn check_lines(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n').map(|line| OsStr::from_bytes(line).to_owned());
    let command = lines.next();
    let flags: Vec<OsString> = lines.collect();
    match command.as_deref().and_then(OsStr::to_str) {
        Some("load") => check_load(&flags),
        Some("health") => check_health(&flags),
        _ => check_serve(&flags),
    }
}

/// Asserts that the message is one line that says where to look. If there is one argument, a flag with a value, the line must
/// name the flag.
fn said_in_one_line(error: &clap::Error, flags: &[OsString], known: &[&str]) {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return;
    }
    let line = one_line(&error.render().to_string(), "see --help");
    assert!(!line.contains('\n'), "{line:?}");
    assert!(line.len() > "; see --help".len() && line.ends_with("; see --help"), "{line:?}");
    // clap refuses an argument that is not Unicode before it knows its flag.
    let mut others = flags.iter().filter(|flag| *flag != ADDRESS);
    if let (Some(flag), None) = (others.next(), others.next())
        && let Some((name, _)) = flag.to_str().and_then(|flag| flag.split_once('='))
        && known.contains(&name)
    {
        assert!(line.contains(name), "{flag:?}: {line:?}");
    }
}

fn printed(config: &Config) -> Vec<OsString> {
    let Config { listen, metrics, backlog, workers, stack_size, max_connections, .. } = config;
    let overload = config.overload.to_possible_value().expect("a value");
    let log = config.log.to_possible_value().expect("a value");
    let mut flags = vec![
        format!("--listen={listen}"),
        format!("--metrics={metrics}"),
        format!("--backlog={backlog}"),
        format!("--workers={workers}"),
        format!("--stack-size={stack_size}"),
        format!("--work={}", format_duration(config.work)),
        format!("--overload={}", overload.get_name()),
        format!("--idle-timeout={}", format_duration(config.idle_timeout)),
        format!("--keepalive={}", format_duration(config.keepalive)),
        format!("--write-timeout={}", format_duration(config.write_timeout)),
        format!("--lame-duck={}", format_duration(config.lame_duck)),
        format!("--drain-timeout={}", format_duration(config.drain_timeout)),
        format!("--log={}", log.get_name()),
    ];
    flags.extend(config.status_host.iter().map(|name| format!("--status-host={name}")));
    flags.extend(max_connections.map(|most| format!("--max-connections={most}")));
    flags.extend(config.max_queue_wait.map(|wait| format!("--max-queue-wait={}", format_duration(wait))));
    flags.extend(config.verbose.then(|| "--verbose".to_owned()));
    flags.extend(config.quiet.then(|| "--quiet".to_owned()));
    flags.into_iter().map(OsString::from).collect()
}

fn printed_plan(plan: &Plan) -> Vec<OsString> {
    let Plan { address, connections, idle, threads, seed, .. } = plan;
    let mut flags = vec![
        address.to_string(),
        format!("--connections={connections}"),
        format!("--size={}..{}", plan.sizes.start(), plan.sizes.end()),
        format!("--idle={idle}"),
        format!("--warmup={}", format_duration(plan.warmup)),
        format!("--timeout={}", format_duration(plan.timeout)),
        format!("--threads={threads}"),
        format!("--seed={seed}"),
    ];
    flags.push(match plan.until {
        Until::Time(duration) => format!("--duration={}", format_duration(duration)),
        Until::Count(count) => format!("--count={count}"),
    });
    // `--churn` and `--pipeline` exclude each other.
    flags.push(if plan.churn { "--churn".to_owned() } else { format!("--pipeline={}", plan.pipeline) });
    flags.extend(plan.rate.map(|rate| format!("--rate={rate}")));
    flags.into_iter().map(OsString::from).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    const UNITS: [(&str, u64); 10] = [
        ("ns", 1),
        ("us", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("sec", 1_000_000_000),
        ("m", 60_000_000_000),
        ("min", 60_000_000_000),
        ("h", 3_600_000_000_000),
        ("d", 86_400_000_000_000),
        ("w", 604_800_000_000_000),
    ];

    /// Values of flags of every kind: right ones, ones that are almost right, and random text.
    fn value() -> impl Strategy<Value = String> {
        let number = || prop_oneof![0..200_u64, any::<u64>()];
        let any_port = prop_oneof![Just(0), any::<u32>()];
        prop_oneof![
            number().prop_map(|number| number.to_string()),
            (number(), select(&UNITS[..])).prop_map(|(number, (unit, _))| format!("{number}{unit}")),
            (number(), select(&["B", "KiB", "MiB", "GiB", "kB", "MB", "TB", "k"][..]))
                .prop_map(|(number, unit)| format!("{number}{unit}")),
            (0..5000_u64, 0..5000_u64).prop_map(|(least, most)| format!("{least}..{most}")),
            (any::<[u8; 4]>(), any_port)
                .prop_map(|(ip, port)| { format!("{}.{}.{}.{}:{port}", ip[0], ip[1], ip[2], ip[3]) }),
            (any::<[u16; 8]>(), any::<u16>())
                .prop_map(|(ip, port)| std::net::SocketAddr::from((ip, port)).to_string()),
            select(&["wait", "reject", "text", "json", "", "-1", "0", "1e3", "1.5KiB", "inf", "NaN"][..])
                .prop_map(str::to_owned),
            "[0-9 a-z.+-]{0,20}",
            any::<String>(),
        ]
    }

    /// A flag with a value, in one word or in two; a switch; or random text.
    fn flag(known: &'static [&'static str]) -> impl Strategy<Value = Vec<OsString>> {
        prop_oneof![
            6 => (select(known), value()).prop_map(|(flag, value)| vec![format!("{flag}={value}").into()]),
            2 => (select(known), value()).prop_map(|(flag, value)| vec![flag.into(), value.into()]),
            2 => select(&["-v", "-q", "-vq", "--verbose", "--quiet", "--churn", "--json", "--", "-h", "-V"][..])
                .prop_map(|switch| vec![switch.into()]),
            1 => "-{0,3}[a-z=-]{0,15}".prop_map(|word| vec![word.into()]),
            1 => vec(1..=255_u8, 0..20).prop_map(|bytes| vec![OsString::from_vec(bytes)]),
        ]
    }

    fn duration_of(text: &str) -> Result<Duration, String> {
        let config = config::from(["millpond", &format!("--idle-timeout={text}")]);
        config.map(|config| config.idle_timeout).map_err(|error| one_line(&error.render().to_string(), "see"))
    }

    #[test]
    fn the_seeds_of_the_fuzzer_hold() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/seeds/flags");
        let seeds: Vec<_> =
            std::fs::read_dir(seeds).expect("seeds").map(|seed| seed.expect("a file").path()).collect();
        assert!(seeds.len() >= 15, "{} seeds", seeds.len());
        seeds.iter().for_each(|seed| check_lines(&std::fs::read(seed).expect("a file")));
    }

    proptest! {
        #[test]
        fn any_flags_of_the_server_are_accepted_or_refused_in_one_line(
            flags in vec(flag(&SERVE_FLAGS), 0..4),
        ) {
            check_serve(&flags.concat());
        }

        #[test]
        fn any_flags_of_the_load_generator_are_accepted_or_refused_in_one_line(
            address in prop_oneof![4 => Just(ADDRESS.to_owned()), 1 => value()],
            flags in vec(flag(&LOAD_FLAGS), 0..4),
        ) {
            check_load(&[vec![address.into()], flags.concat()].concat());
        }

        #[test]
        fn any_flags_of_the_health_check_are_accepted_or_refused_in_one_line(
            address in prop_oneof![2 => Just(ADDRESS.to_owned()), 1 => value()],
            flags in vec(prop_oneof![3 => flag(&HEALTH_FLAGS), 1 => Just(vec!["--ready".into()])], 0..3),
        ) {
            check_health(&[vec![address.into()], flags.concat()].concat());
        }

        #[test]
        fn any_single_value_is_accepted_or_its_flag_is_named(
            (number, value) in (any::<usize>(), value()),
        ) {
            let flag = |known: &[&str]| OsString::from(format!("{}={value}", known[number % known.len()]));
            check_serve(&[flag(&SERVE_FLAGS)]);
            check_load(&[ADDRESS.into(), flag(&LOAD_FLAGS)]);
            check_health(&[ADDRESS.into(), flag(&HEALTH_FLAGS)]);
        }

        #[test]
        fn whole_numbers_are_accepted_exactly_within_their_range(number in prop_oneof![0..3_u128, 9_998..10_003_u128, any::<u128>()]) {
            let config = config::from(["millpond", &format!("--workers={number}")]);
            let taken = config.ok().map(|config| config.workers as u128);
            prop_assert_eq!(taken, (1..=10_000).contains(&number).then_some(number));
        }

        #[test]
        fn durations_are_the_sum_of_their_parts_up_to_a_year(
            parts in vec((0..1000_u64, select(&UNITS[..])), 1..5),
            spaces in "[ ]{0,2}",
        ) {
            let text: Vec<String> = parts.iter().map(|(number, (unit, _))| format!("{number}{unit}")).collect();
            let nanoseconds: u128 = parts.iter().map(|(number, (_, unit))| u128::from(number * unit)).sum();
            let taken = duration_of(&text.join(&spaces));
            if nanoseconds <= YEAR.as_nanos() {
                prop_assert_eq!(taken.map(|duration| duration.as_nanos()), Ok(nanoseconds));
            } else {
                let message = taken.expect_err("longer than a year");
                prop_assert!(message.contains("--idle-timeout") && message.contains("at most"), "{}", message);
            }
        }

        #[test]
        fn any_duration_up_to_a_year_is_parsed_from_how_it_is_printed(nanoseconds in 0..=YEAR.as_nanos()) {
            let nanoseconds = u64::try_from(nanoseconds).expect("a year is shorter");
            let duration = Duration::from_nanos(nanoseconds);
            prop_assert_eq!(duration_of(&format_duration(duration).to_string()), Ok(duration));
        }
    }
}
