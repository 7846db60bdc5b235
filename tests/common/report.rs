//! The report of a drain: the last line of the program's log, or the library's return value.

use super::Millpond;

/// The numbers of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub in_drain: u64,
    pub served: u64,
    pub closed_idle: u64,
    pub failed: u64,
    pub cut: u64,
    pub accepted: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl From<millpond::Report> for Report {
    fn from(report: millpond::Report) -> Self {
        Report {
            in_drain: report.in_drain,
            served: report.served,
            closed_idle: report.closed_idle,
            failed: report.failed,
            cut: report.cut,
            accepted: report.accepted,
            bytes_in: report.received,
            bytes_out: report.sent,
        }
    }
}

/// The report in the log of a server that has ended.
pub fn report(server: &Millpond) -> Report {
    let log = server.log();
    let line = log.lines().last().expect("a log");
    let number = |before: &str, after: &str| -> u64 {
        let start = line.find(before).unwrap_or_else(|| panic!("no {before:?} in {line}")) + before.len();
        let end = line[start..].find(after).unwrap_or_else(|| panic!("no {after:?} in {line}")) + start;
        line[start..end].rsplit(' ').next().expect("a number").parse().expect("a number")
    };
    Report {
        in_drain: number(" ", " connections at the drain"),
        served: number("drain: ", " served"),
        closed_idle: number("end, ", " closed idle"),
        failed: number("idle, ", " failed"),
        cut: number("failed, ", " cut"),
        accepted: number(" s; ", " connections, "),
        bytes_in: number("connections, ", " bytes in"),
        bytes_out: number("and ", " bytes out"),
    }
}
