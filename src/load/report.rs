//! What a run has found: each thread counts into a [`Tally`], and the tallies are added up to a [`Report`].
//!
//! Every failure is counted, by its kind; of mismatches the first [`MISMATCHES_SHOWN`] are kept whole.

use std::fmt;
use std::io;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Mismatches that are kept: enough to see what they have in common.
pub(super) const MISMATCHES_SHOWN: usize = 10;

/// The longest latency told apart from longer ones. As long as any `--timeout` in use.
const LATENCY_NS_MAX: u64 = 3_600_000_000_000;

/// Digits of a latency: within a thousandth.
const LATENCY_DIGITS: u8 = 3;

/// What can go wrong with a connection. Each ends it, and is counted once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nobody listens.
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
    /// At the end of the run the answer was not there.
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

    /// Of an error while a connection is made.
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

    /// Of an error on a connection that was made.
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
    /// What was to come there, the first bytes of it; empty when nothing was.
    pub(crate) expected: Vec<u8>,
    /// What came, the first bytes of it.
    pub(crate) got: Vec<u8>,
    pub(crate) origin: Origin,
}

/// Where the bytes that came belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// After them the stream goes on as it should.
    Changed,
    /// Further on in the stream: so many bytes are missing before them.
    Missing(u64),
    /// Further back in the stream: they came again from this offset.
    Repeated(u64),
    /// To another connection, at this offset of its stream.
    Foreign { connection: u64, offset: u64 },
    /// Nowhere, or there are too few to tell.
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

/// What one thread has seen.
#[derive(Debug)]
pub(super) struct Tally {
    /// When counting began and when the thread sent nothing more; `None` if it did not send.
    pub(super) span_ns: Option<(u64, u64)>,
    latencies: Histogram<u64>,
    /// When the last answer came.
    last_answer_ns: u64,
    messages: u64,
    bytes: u64,
    /// Messages that were begun and whose answer never came whole.
    pub(super) lost: u64,
    /// Messages that were due and had not been begun when the run ended.
    pub(super) overdue: u64,
    failures: [u64; Failure::ALL.len()],
    mismatches: Vec<Mismatch>,
    pub(super) longest_silence_ns: u64,
    /// Connections on which something was asked, and those of them that got no answer.
    pub(super) asked: u64,
    pub(super) never_answered: u64,
}

impl Tally {
    pub(super) fn new() -> Self {
        let latencies = Histogram::new_with_bounds(1, LATENCY_NS_MAX, LATENCY_DIGITS);
        Tally {
            span_ns: None,
            latencies: latencies.expect("literal bounds are valid"),
            last_answer_ns: 0,
            messages: 0,
            bytes: 0,
            lost: 0,
            overdue: 0,
            failures: [0; Failure::ALL.len()],
            mismatches: Vec::new(),
            longest_silence_ns: 0,
            asked: 0,
            never_answered: 0,
        }
    }

    /// Counts an answer. It was waited for since `since_ns`.
    pub(super) fn answer(&mut self, bytes: u64, since_ns: u64, now_ns: u64) {
        self.latencies.saturating_record(now_ns.saturating_sub(since_ns).max(1));
        self.last_answer_ns = now_ns;
        self.messages += 1;
        self.bytes += bytes;
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
        self.longest_silence_ns = self.longest_silence_ns.max(ns);
    }

    pub(super) fn failed(&self) -> u64 {
        self.failures.iter().sum()
    }

    pub(super) fn messages(&self) -> u64 {
        self.messages
    }

    /// The slowest answer so far.
    pub(super) fn slowest(&self) -> Duration {
        Duration::from_nanos(self.latencies.max())
    }

    pub(super) fn merge(&mut self, other: Tally) {
        self.span_ns = match (self.span_ns, other.span_ns) {
            (Some((from, to)), Some((from_too, to_too))) => Some((from.min(from_too), to.max(to_too))),
            (span, span_too) => span.or(span_too),
        };
        self.latencies.add(&other.latencies).expect("the bounds are the same");
        self.last_answer_ns = self.last_answer_ns.max(other.last_answer_ns);
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.lost += other.lost;
        self.overdue += other.overdue;
        self.failures.iter_mut().zip(other.failures).for_each(|(sum, more)| *sum += more);
        self.mismatches.extend(other.mismatches);
        self.mismatches.truncate(MISMATCHES_SHOWN);
        self.silence(other.longest_silence_ns);
        self.asked += other.asked;
        self.never_answered += other.never_answered;
    }

    pub(super) fn into_report(mut self, opened: u64) -> Report {
        self.mismatches.sort_by_key(|mismatch| mismatch.connection);
        let (from_ns, to_ns) = self.span_ns.unwrap_or_default();
        // Answers that came after the last message was sent have taken their time too.
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
            longest_silence: Duration::from_nanos(self.longest_silence_ns),
            opened,
            asked: self.asked,
            never_answered: self.never_answered,
        }
    }
}

/// What a run has found. The warm-up's failures are in it, its messages are not.
#[derive(Debug)]
pub(crate) struct Report {
    /// From the end of the warm-up to the end of the run or the last answer, whichever was later.
    pub(crate) elapsed: Duration,
    /// Messages whose every byte came back, and those bytes.
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    /// In nanoseconds.
    pub(crate) latencies: Histogram<u64>,
    pub(crate) lost: u64,
    pub(crate) overdue: u64,
    failures: [u64; Failure::ALL.len()],
    /// The first few.
    pub(crate) mismatches: Vec<Mismatch>,
    pub(crate) longest_silence: Duration,
    /// Connections opened in all, or tried to.
    pub(crate) opened: u64,
    pub(crate) asked: u64,
    pub(crate) never_answered: u64,
}

impl Report {
    pub(crate) fn count(&self, failure: Failure) -> u64 {
        self.failures[failure as usize]
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failures.iter().sum()
    }

    /// Per second, of something counted while it ran.
    #[expect(clippy::cast_precision_loss, reason = "no rate has 53 significant bits")]
    pub(crate) fn rate(&self, count: u64) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
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
    }
}
