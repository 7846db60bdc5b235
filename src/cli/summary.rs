//! What a run of `millpond load` has found, as a table for a person or as JSON for a program.
//!
//! A number that was not measured is missing: it is null in JSON, and the table says in words that there is none.

use std::fmt::Write;
use std::time::Duration;

use bytesize::ByteSize;
use serde_json::{Map, Value, json};

use crate::load::{FAILURES_IN_ROW, Failure, Origin, Plan, Report, Until};

/// The percentiles reported, with their names in JSON.
const PERCENTILES: [(f64, &str, &str); 5] = [
    (50.0, "p50", "latency_p50_ns"),
    (90.0, "p90", "latency_p90_ns"),
    (99.0, "p99", "latency_p99_ns"),
    (99.9, "p99.9", "latency_p99_9_ns"),
    (99.99, "p99.99", "latency_p99_99_ns"),
];

/// The width of a column of the latencies.
const COLUMN: usize = 10;

/// The report for a person. Every line but the first begins with what it is about.
pub(crate) fn table(plan: &Plan, report: &Report, stopped: bool) -> String {
    let mut text = heading(plan, report, stopped);
    let mut line = |name: &str, value: &str| {
        // Writing into a string does not fail.
        let _ = writeln!(text, "{name:<16} {value}");
    };
    let rate = |count: u64, shown: fn(u64) -> String| match report.rate(count) {
        Some(rate) => format!("{}/s", shown(whole(rate))),
        None => "no rate: counting had not begun".to_owned(),
    };
    line("messages", &format!("{}   {}", grouped(report.messages), rate(report.messages, grouped)));
    let size = |bytes: u64| ByteSize(bytes).to_string();
    line("bytes each way", &format!("{}   {}", grouped(report.bytes), rate(report.bytes, size)));
    if report.latencies.is_empty() {
        line("latency", "none: no message was due after the warm-up");
    } else {
        let names = PERCENTILES.iter().map(|(_, name, _)| *name).chain(["max"]);
        line("latency", names.map(|name| format!("{name:>COLUMN$}")).collect::<String>().trim_start());
        let values =
            PERCENTILES.iter().map(|(percentile, ..)| report.latencies.value_at_percentile(*percentile));
        let values = values.chain([report.latencies.max()]);
        let row: String = values.map(|ns| format!("{:>COLUMN$}", short(Duration::from_nanos(ns)))).collect();
        line("", row.trim_start());
    }
    if report.without_answer() > 0 {
        let unanswered = grouped(report.without_answer());
        line(
            "at least",
            &format!("{unanswered} messages without an answer count as waiting to the end of the run"),
        );
    }
    line("longest silence", &report.longest_silence.map_or("none: nothing was wanted".to_owned(), short));
    let never_answered = match report.asked {
        0 => "no message went out on any connection".to_owned(),
        asked => format!("{} of {} connections", grouped(report.never_answered), grouped(asked)),
    };
    line("never answered", &never_answered);
    if report.given_up > 0 {
        let (given_up, all) = (grouped(report.given_up), grouped(plan.connections as u64));
        let end = if report.given_up == plan.connections as u64 { ", which ended the run" } else { "" };
        line(
            "given up",
            &format!("{given_up} of {all} connections, after {FAILURES_IN_ROW} failures in a row{end}"),
        );
    }
    if plan.idle > 0 {
        let (kept, all) = (grouped(report.idle_kept), grouped(plan.idle as u64));
        line("idle", &format!("{kept} of {all} connections were open at the end"));
    }
    if plan.rate.is_some() {
        line("overdue", &format!("{} messages were due and not sent", grouped(report.overdue)));
    }
    if report.lost > 0 {
        line("lost", &format!("{} messages did not come back whole", grouped(report.lost)));
    }
    line("errors", &grouped(report.failed()));
    for failure in Failure::ALL.into_iter().filter(|failure| report.count(*failure) > 0) {
        let remedy = remedy(failure).map(|remedy| format!("   ({remedy})")).unwrap_or_default();
        line(&format!("  {}", failure.name()), &format!("{}{remedy}", grouped(report.count(failure))));
    }
    for mismatch in &report.mismatches {
        line("mismatch", &mismatch.to_string());
    }
    let unseen = report.count(Failure::Mismatch) - report.mismatches.len() as u64;
    if unseen > 0 {
        line("mismatch", &format!("and {} more", grouped(unseen)));
    }
    text
}

fn heading(plan: &Plan, report: &Report, stopped: bool) -> String {
    let (least, most) = (ByteSize(*plan.sizes.start()), ByteSize(*plan.sizes.end()));
    let size = if least == most { least.to_string() } else { format!("{least} to {most}") };
    let mut text = format!("{}: {} connections, {size}", plan.address, grouped(plan.connections as u64));
    if plan.pipeline > 1 {
        let _ = write!(text, ", {} at a time", plan.pipeline);
    }
    if plan.churn {
        text.push_str(", a new one for each message");
    }
    if plan.idle > 0 {
        let _ = write!(text, ", {} idle", grouped(plan.idle as u64));
    }
    if let Some(rate) = plan.rate {
        let _ = write!(text, ", {}/s due", grouped(rate));
    }
    let _ = write!(text, ", {:.1} s", report.elapsed.as_secs_f64());
    if stopped {
        text.push_str(", ended by a signal");
    }
    text.push('\n');
    text
}

/// The cause or the remedy of a failure, if it is not the service's fault alone.
fn remedy(failure: Failure) -> Option<&'static str> {
    match failure {
        Failure::NoPorts => {
            Some("no local port is free: ask for fewer connections, or widen net.ipv4.ip_local_port_range")
        }
        Failure::NoDescriptors => Some("too many open files: ask for fewer connections, or raise ulimit -n"),
        Failure::ConnectRefused => Some("no process listens there"),
        _ => None,
    }
}

/// The report for a program: one object on one line. Names end in their unit.
pub(crate) fn json(plan: &Plan, report: &Report, stopped: bool) -> String {
    let by_kind: Map<String, Value> = Failure::ALL
        .into_iter()
        .map(|failure| (failure.name().to_owned(), report.count(failure).into()))
        .collect();
    let mismatches: Vec<Value> = report
        .mismatches
        .iter()
        .map(|mismatch| {
            let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            json!({
                "connection": mismatch.connection,
                "offset_bytes": mismatch.offset,
                "expected_hex": hex(&mismatch.expected),
                "got_hex": hex(&mismatch.got),
                "origin": match mismatch.origin {
                    Origin::Unknown => Value::Null,
                    origin => origin.to_string().into(),
                },
            })
        })
        .collect();
    let (duration, count) = match plan.until {
        Until::Time(duration) => (Some(duration.as_secs_f64()), None),
        Until::Count(count) => (None, Some(count)),
    };
    let measured = !report.latencies.is_empty();
    let mut object = json!({
        "address": plan.address.to_string(),
        "connections": plan.connections,
        "idle": plan.idle,
        "size_bytes_min": plan.sizes.start(),
        "size_bytes_max": plan.sizes.end(),
        "pipeline": plan.pipeline,
        "churn": plan.churn,
        "rate_due_per_second": plan.rate,
        "duration_seconds": duration,
        "count": count,
        "warmup_seconds": plan.warmup.as_secs_f64(),
        "threads": plan.threads,
        "seed": plan.seed,
        "ended_by_signal": stopped,
        "elapsed_seconds": report.elapsed.as_secs_f64(),
        "messages": report.messages,
        "messages_per_second": report.rate(report.messages),
        "bytes": report.bytes,
        "bytes_per_second": report.rate(report.bytes),
        "messages_lost": report.lost,
        "messages_overdue": report.overdue,
        "latency_at_least_messages": report.without_answer(),
        "latency_mean_ns": measured.then(|| report.latencies.mean()),
        "latency_max_ns": measured.then(|| report.latencies.max()),
        "latency_answered_max_ns": report.slowest_answer.map(whole_ns),
        "longest_silence_seconds": report.longest_silence.map(|silence| silence.as_secs_f64()),
        "connections_attempted": report.attempted,
        "connections_opened": report.opened,
        "connections_asked": report.asked,
        "connections_never_answered": report.never_answered,
        "connections_given_up": report.given_up,
        "connections_idle_kept": report.idle_kept,
        "errors": report.failed(),
        "errors_by_kind": by_kind,
        "mismatches": mismatches,
    });
    for (percentile, _, name) in PERCENTILES {
        object[name] = measured.then(|| report.latencies.value_at_percentile(percentile)).into();
    }
    format!("{object}\n")
}

/// A time in whole nanoseconds.
fn whole_ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A number with commas between its thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is not negative, and far below 2^64"
)]
fn whole(rate: f64) -> u64 {
    rate.round() as u64
}

/// A time to about three digits: `7.12 us`, `534 ms`, `12.0 s`.
fn short(time: Duration) -> String {
    let ns = time.as_secs_f64() * 1e9;
    let (value, unit) = match ns {
        ..1e6 => (ns / 1e3, "us"),
        ..1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        let times = [0, 7_123, 53_400, 999_000, 1_000_000, 534_400_000, 12_040_000_000];
        assert_eq!(
            times.map(|ns| short(Duration::from_nanos(ns))),
            ["0.00 us", "7.12 us", "53.4 us", "999 us", "1.00 ms", "534 ms", "12.0 s"]
        );
    }
}
