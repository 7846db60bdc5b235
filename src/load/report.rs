//! The findings of a run: each thread counts into a [`Tally`], and the tallies are added up to a [`Report`].
//!
//! Every failure is counted by its kind. The first [`MISMATCHES_SHOWN`] mismatches are kept whole.
//!
//! The latencies hold every message that was due, answered or not. A message without an answer counts with the time
//! from when it was due to the end of the run. Its latency is at least that. If such messages were left out, an outage
//! would leave no trace in the percentiles. A value that was not measured at all is `None`, never 0.

use std::fmt;
use std::io;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::unanswered::Unanswered;

/// Mismatches that are kept. These are enough to see what they have in common.
pub(super) const MISMATCHES_SHOWN: usize = 10;

/// The longest latency told apart from longer ones: three years. A message can wait for the longest `--duration` and
/// then for the longest `--timeout`, and each of them is at most a year.
const LATENCY_NS_MAX: u64 = 3 * 365 * 24 * 3600 * 1_000_000_000;

/// Digits of a latency, which is then exact to a thousandth.
const LATENCY_DIGITS: u8 = 3;

/// What can go wrong with a connection. Each ends it, and is counted once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// No process listens at that address.
    ConnectRefused,
    /// The connection was not made in time.
    ConnectTimeout,
    /// The connection could not be made for another reason, such as no route.
    ConnectFailed,
    /// This machine has no local port left for that address.
    NoPorts,
    /// This process may open no more files.
    NoDescriptors,
    /// The peer reset the connection, or closed it while we sent.
    Reset,
    /// The peer ended the stream while an answer was wanted, or before anything was asked.
    ClosedEarly,
    /// A byte that was not sent there.
    Mismatch,
    /// No byte came in time.
    AnswerTimeout,
    /// At the end of the run the answer, or the connection, was still missing.
    Unanswered,
    /// A silent connection was closed by its peer.
    IdleClosed,
    /// Any other error of the socket.
    Other,
}

impl Failure {
    pub(crate) const ALL: [Failure; 12] = [
        Failure::ConnectRefused,
        Failure::ConnectTimeout,
        Failure::ConnectFailed,
        Failure::NoPorts,
        Failure::NoDescriptors,
        Failure::Reset,
        Failure::ClosedEarly,
        Failure::Mismatch,
        Failure::AnswerTimeout,
        Failure::Unanswered,
        Failure::IdleClosed,
        Failure::Other,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Failure::ConnectRefused => "connect_refused",
            Failure::ConnectTimeout => "connect_timeout",
            Failure::ConnectFailed => "connect_failed",
            Failure::NoPorts => "no_ports",
            Failure::NoDescriptors => "no_descriptors",
            Failure::Reset => "reset",
            Failure::ClosedEarly => "closed_early",
            Failure::Mismatch => "mismatch",
            Failure::AnswerTimeout => "answer_timeout",
            Failure::Unanswered => "unanswered",
            Failure::IdleClosed => "idle_closed",
            Failure::Other => "other",
        }
    }

    /// Sorts an error that occurred while a connection was made.
    pub(super) fn of_connecting(error: &io::Error) -> Self {
        let errno = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
        match (errno, error.kind()) {
            (Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE), _) => Failure::NoDescriptors,
            (_, io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse) => Failure::NoPorts,
            (_, io::ErrorKind::ConnectionRefused) => Failure::ConnectRefused,
            (_, io::ErrorKind::TimedOut) => Failure::ConnectTimeout,
            (_, io::ErrorKind::ConnectionReset) => Failure::Reset,
            _ => Failure::ConnectFailed,
        }
    }

    /// Sorts an error on a connection that had been made.
    pub(super) fn of_talking(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Failure::Reset,
            io::ErrorKind::TimedOut => Failure::AnswerTimeout,
            _ => Failure::Other,
        }
    }
}

/// A byte that was not sent there.
#[derive(Clone, Debug)]
pub(crate) struct Mismatch {
    /// The connection's number, from 1, in the order they were opened.
    pub(crate) connection: u64,
    /// Which byte of its stream is the first that differs, from 0.
    pub(crate) offset: u64,
    /// The first bytes that were expected there; empty if none were.
    pub(crate) expected: Vec<u8>,
    /// The first bytes that came instead.
    pub(crate) got: Vec<u8>,
    pub(crate) origin: Origin,
}

/// Where the bytes that came belong in what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// They were changed in place, and the stream goes on correctly after them.
    Changed,
    /// They belong further on in the stream: this many bytes are missing before them.
    Missing(u64),
    /// They belong further back in the stream: they came again from this offset.
    Repeated(u64),
    /// They belong to another connection, at this offset of its stream.
    Foreign { connection: u64, offset: u64 },
    /// They belong nowhere, or there are too few to tell.
    Unknown,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { connection, offset, expected, got, origin } = self;
        write!(f, "connection {connection}, offset {offset}: expected {}, got {}", hex(expected), hex(got))?;
        match origin {
            Origin::Unknown => Ok(()),
            origin => write!(f, ": {origin}"),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Changed => write!(f, "changed, and what follows is right"),
            Origin::Missing(bytes) => write!(f, "{bytes} bytes are missing"),
            Origin::Repeated(offset) => write!(f, "the bytes from offset {offset} again"),
            Origin::Foreign { connection, offset } => {
                write!(f, "the bytes of connection {connection} from its offset {offset}")
            }
            Origin::Unknown => write!(f, "unknown"),
        }
    }
}

/// Bytes for a person: `3f a2`, or `nothing`.
fn hex(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "nothing".to_owned();
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// The findings of one thread.
#[derive(Debug)]
pub(super) struct Tally {
    /// When counting began, and when the thread stopped sending. `None` if it did not send, or stopped in the warm-up.
    pub(super) span_ns: Option<(u64, u64)>,
    latencies: Histogram<u64>,
    /// When the last answer came.
    last_answer_ns: u64,
    /// The longest latency of an answer that came.
    slowest_answer_ns: u64,
    messages: u64,
    bytes: u64,
    /// Messages that were begun and whose answer never came whole.
    lost: u64,
    /// The lost messages that are not in the latencies yet.
    unanswered: Unanswered,
    /// Messages that were due and had not been begun when the run ended.
    overdue: u64,
    failures: [u64; Failure::ALL.len()],
    mismatches: Vec<Mismatch>,
    /// `None` if no connection and no answer was wanted.
    longest_silence_ns: Option<u64>,
    /// Connections that were made.
    pub(super) opened: u64,
    /// Connections on which something was asked, and those of them that got no answer.
    pub(super) asked: u64,
    pub(super) never_answered: u64,
    /// Slots that opened no more connections, because too many had failed in a row.
    pub(super) given_up: u64,
    /// Silent connections that were open at the end.
    pub(super) idle_kept: u64,
}

impl Tally {
    pub(super) fn new() -> Self {
        let latencies = Histogram::new_with_bounds(1, LATENCY_NS_MAX, LATENCY_DIGITS);
        Tally {
            span_ns: None,
            latencies: latencies.expect("literal bounds are valid"),
            last_answer_ns: 0,
            slowest_answer_ns: 0,
            messages: 0,
            bytes: 0,
            lost: 0,
            unanswered: Unanswered::new(),
            overdue: 0,
            failures: [0; Failure::ALL.len()],
            mismatches: Vec::new(),
            longest_silence_ns: None,
            opened: 0,
            asked: 0,
            never_answered: 0,
            given_up: 0,
            idle_kept: 0,
        }
    }

    /// Counts an answer to a message that was sent, or due, at `since_ns`.
    pub(super) fn answer(&mut self, bytes: u64, since_ns: u64, now_ns: u64) {
        let latency_ns = now_ns.saturating_sub(since_ns).max(1);
        self.latencies.saturating_record(latency_ns);
        self.last_answer_ns = now_ns;
        self.slowest_answer_ns = self.slowest_answer_ns.max(latency_ns);
        self.messages += 1;
        self.bytes += bytes;
    }

    /// Counts a message whose answer will not come, while the run goes on. [`end`](Tally::end) tells how long it
    /// waited.
    pub(super) fn lose(&mut self, since_ns: u64) {
        self.lost += 1;
        self.unanswered.add(since_ns);
    }

    /// Counts a message whose answer was waited for until now, after the run's end, and did not come.
    pub(super) fn lose_after_the_end(&mut self, since_ns: u64, now_ns: u64) {
        self.lost += 1;
        self.latencies.saturating_record(now_ns.saturating_sub(since_ns).max(1));
    }

    /// Counts a message that was due and was not begun by `end_ns`.
    pub(super) fn overdue(&mut self, due_ns: u64, end_ns: u64) {
        self.overdue += 1;
        self.latencies.saturating_record(end_ns.saturating_sub(due_ns).max(1));
    }

    /// Enters the messages that were lost while the run went on into the latencies. It ended at `end_ns`.
    pub(super) fn end(&mut self, end_ns: u64) {
        for (waited_ns, count) in self.unanswered.take(end_ns) {
            self.latencies.saturating_record_n(waited_ns.max(1), count);
        }
    }

    pub(super) fn fail(&mut self, failure: Failure) {
        self.failures[failure as usize] += 1;
    }

    pub(super) fn mismatch(&mut self, mismatch: Mismatch) {
        if self.mismatches.len() < MISMATCHES_SHOWN {
            self.mismatches.push(mismatch);
        }
    }

    pub(super) fn silence(&mut self, ns: u64) {
        self.longest_silence_ns = self.longest_silence_ns.max(Some(ns));
    }

    pub(super) fn failed(&self) -> u64 {
        self.failures.iter().sum()
    }

    pub(super) fn messages(&self) -> u64 {
        self.messages
    }

    /// The slowest answer so far.
    pub(super) fn slowest(&self) -> Duration {
        Duration::from_nanos(self.slowest_answer_ns)
    }

    /// Adds what another thread has counted. Both must have come to their [`end`](Tally::end).
    pub(super) fn merge(&mut self, other: Tally) {
        self.span_ns = match (self.span_ns, other.span_ns) {
            (Some((from, to)), Some((from_too, to_too))) => Some((from.min(from_too), to.max(to_too))),
            (span, span_too) => span.or(span_too),
        };
        self.latencies.add(&other.latencies).expect("the bounds are the same");
        self.last_answer_ns = self.last_answer_ns.max(other.last_answer_ns);
        self.slowest_answer_ns = self.slowest_answer_ns.max(other.slowest_answer_ns);
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.lost += other.lost;
        self.overdue += other.overdue;
        self.failures.iter_mut().zip(other.failures).for_each(|(sum, more)| *sum += more);
        self.mismatches.extend(other.mismatches);
        self.mismatches.truncate(MISMATCHES_SHOWN);
        self.longest_silence_ns = self.longest_silence_ns.max(other.longest_silence_ns);
        self.opened += other.opened;
        self.asked += other.asked;
        self.never_answered += other.never_answered;
        self.given_up += other.given_up;
        self.idle_kept += other.idle_kept;
    }

    /// The report of a run that began to open so many connections.
    pub(super) fn into_report(mut self, attempted: u64) -> Report {
        self.mismatches.sort_by_key(|mismatch| mismatch.connection);
        let (from_ns, to_ns) = self.span_ns.unwrap_or_default();
        // The time until the last answer belongs to the run, also if nothing was sent any more.
        let elapsed_ns = to_ns.max(self.last_answer_ns).saturating_sub(from_ns);
        Report {
            elapsed: Duration::from_nanos(elapsed_ns),
            messages: self.messages,
            bytes: self.bytes,
            latencies: self.latencies,
            lost: self.lost,
            overdue: self.overdue,
            failures: self.failures,
            mismatches: self.mismatches,
            longest_silence: self.longest_silence_ns.map(Duration::from_nanos),
            slowest_answer: (self.messages > 0).then_some(Duration::from_nanos(self.slowest_answer_ns)),
            attempted,
            opened: self.opened,
            asked: self.asked,
            never_answered: self.never_answered,
            given_up: self.given_up,
            idle_kept: self.idle_kept,
        }
    }
}

/// The findings of a run. They include the failures of the warm-up, and not its messages.
#[derive(Debug)]
pub(crate) struct Report {
    /// From the end of the warm-up to the end of the run or the last answer, whichever was later.
    pub(crate) elapsed: Duration,
    /// Messages whose every byte came back, and those bytes.
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    /// In nanoseconds, of every message that was due. Those without an answer have waited at least that long.
    pub(crate) latencies: Histogram<u64>,
    /// The longest latency of an answer that came; `None` if none came.
    pub(crate) slowest_answer: Option<Duration>,
    /// Messages that were begun and did not come back whole.
    pub(crate) lost: u64,
    /// Messages that were due and never begun.
    pub(crate) overdue: u64,
    failures: [u64; Failure::ALL.len()],
    /// The first [`MISMATCHES_SHOWN`].
    pub(crate) mismatches: Vec<Mismatch>,
    /// The longest time that a slot wanted an answer, or a connection, and got no byte of an answer. `None` if no slot
    /// wanted anything.
    pub(crate) longest_silence: Option<Duration>,
    /// Connections that were begun, and those of them that were made.
    pub(crate) attempted: u64,
    pub(crate) opened: u64,
    /// Connections on which something was asked, and those of them that got no answer.
    pub(crate) asked: u64,
    pub(crate) never_answered: u64,
    /// Slots that opened no more connections, because too many had failed in a row.
    pub(crate) given_up: u64,
    /// Silent connections that were open at the end.
    pub(crate) idle_kept: u64,
}

impl Report {
    pub(crate) fn count(&self, failure: Failure) -> u64 {
        self.failures[failure as usize]
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failures.iter().sum()
    }

    /// Messages that are in the latencies with the least time that they have waited, because no answer came.
    pub(crate) fn without_answer(&self) -> u64 {
        self.lost + self.overdue
    }

    /// Whether messages were answered, each that was due, and nothing failed.
    pub(crate) fn is_good(&self) -> bool {
        self.failed() == 0 && self.without_answer() == 0 && self.messages > 0
    }

    /// So many per second of the run. `None` if the run ended before counting began.
    #[expect(clippy::cast_precision_loss, reason = "no rate has 53 significant bits")]
    pub(crate) fn rate(&self, count: u64) -> Option<f64> {
        let seconds = self.elapsed.as_secs_f64();
        (seconds > 0.0).then(|| count as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_is_counted_as_itself() {
        let mut tally = Tally::new();
        for (place, failure) in Failure::ALL.into_iter().enumerate() {
            assert_eq!(failure as usize, place);
            tally.fail(failure);
        }
        tally.fail(Failure::Reset);
        let report = tally.into_report(0);
        assert_eq!((report.count(Failure::Reset), report.count(Failure::Other), report.failed()), (2, 1, 13));
    }

    #[test]
    fn errors_of_the_system_are_told_apart() {
        use rustix::io::Errno;
        let connecting = |errno: Errno| Failure::of_connecting(&errno.into());
        assert_eq!(connecting(Errno::CONNREFUSED), Failure::ConnectRefused);
        assert_eq!(connecting(Errno::TIMEDOUT), Failure::ConnectTimeout);
        assert_eq!([Errno::ADDRNOTAVAIL, Errno::ADDRINUSE].map(connecting), [Failure::NoPorts; 2]);
        assert_eq!([Errno::MFILE, Errno::NFILE].map(connecting), [Failure::NoDescriptors; 2]);
        assert_eq!([Errno::NETUNREACH, Errno::HOSTUNREACH].map(connecting), [Failure::ConnectFailed; 2]);
        let talking = |errno: Errno| Failure::of_talking(&errno.into());
        assert_eq!([Errno::CONNRESET, Errno::PIPE].map(talking), [Failure::Reset; 2]);
        assert_eq!(talking(Errno::TIMEDOUT), Failure::AnswerTimeout);
    }

    #[test]
    fn two_threads_tallies_are_one() {
        let (mut one, mut two) = (Tally::new(), Tally::new());
        one.span_ns = Some((1000, 5000));
        two.span_ns = Some((2000, 4000));
        one.answer(10, 2000, 3000);
        two.answer(20, 2000, 9000);
        one.merge(two);
        let report = one.into_report(2);
        assert_eq!((report.messages, report.bytes), (2, 30));
        assert_eq!(report.elapsed, Duration::from_nanos(8000), "the last answer came after the end");
        assert_eq!(report.latencies.max() / 10, 700);
        assert_eq!(report.slowest_answer, Some(Duration::from_nanos(7000)));
    }

    #[test]
    fn messages_without_an_answer_are_in_the_latencies_with_the_time_to_the_end() {
        const MS: u64 = 1_000_000;
        let mut tally = Tally::new();
        tally.span_ns = Some((0, 1000 * MS));
        (0..6).for_each(|_| tally.answer(1, 0, MS));
        tally.lose(100 * MS);
        tally.lose(300 * MS);
        tally.end(1000 * MS);
        tally.overdue(500 * MS, 1000 * MS);
        tally.lose_after_the_end(800 * MS, 1200 * MS);
        assert_eq!(tally.slowest(), Duration::from_millis(1), "only answers count");
        let mut all = Tally::new();
        all.merge(tally);
        let report = all.into_report(1);
        assert_eq!((report.messages, report.lost, report.overdue), (6, 3, 1));
        assert_eq!((report.latencies.len(), report.without_answer()), (10, 4));
        let ms = |percentile: f64| report.latencies.value_at_percentile(percentile) / MS;
        assert_eq!([60.0, 70.0, 80.0, 90.0, 100.0].map(ms), [1, 400, 500, 700, 900]);
    }

    #[test]
    fn what_was_not_measured_is_no_number() {
        let report = Tally::new().into_report(0);
        assert_eq!((report.longest_silence, report.slowest_answer, report.rate(0)), (None, None, None));
        assert!(!report.is_good(), "no message was answered");
    }

    #[test]
    fn a_run_is_good_only_if_every_message_that_was_due_was_answered() {
        let good = || {
            let mut tally = Tally::new();
            tally.answer(1, 1, 2);
            tally
        };
        assert!(good().into_report(1).is_good());
        let mut overdue = good();
        overdue.overdue(1, 2);
        assert!(!overdue.into_report(1).is_good());
        let mut failed = good();
        failed.fail(Failure::Reset);
        assert!(!failed.into_report(1).is_good());
    }

    #[test]
    fn a_latency_of_two_years_is_told_from_shorter_ones() {
        let day_ns = 24 * 3600 * 1_000_000_000;
        let mut tally = Tally::new();
        tally.overdue(0, 730 * day_ns);
        assert_eq!(tally.into_report(0).latencies.max() / day_ns, 730);
    }
}
