//! A thread of the load generator: its slots, the events on them, and what each does next.
//!
//! The thread waits in one place for all of its connections, and never longer than [`SWEEP`]. A sweep over all slots then
//! looks at their times. A message costs a read, a write and a share of a wait. The thread allocates nothing for it,
//! and touches nothing that other threads use.
//!
//! If a connection fails, its slot opens the next one after [`REOPEN_PAUSE`]. After [`FAILURES_IN_ROW`] failures with no
//! answer between them the slot gives up. When the slots of all threads have given up, the run is over.

mod phases;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mio::event::Event;
use mio::{Events, Poll, Token};

use self::phases::{Meeting, OPENING, OTHERS, Phase};
use super::dial::Dial;
use super::plan::Plan;
use super::report::{Failure, Tally};
use super::schedule::{Alarm, Schedule};
use super::slot::{Bad, PIECE, Received, Slot, Stage};
use super::{Live, Shared};

/// Events taken from the kernel at a time.
const EVENTS: usize = 1024;

/// Messages that the thread begins because they are due, before it looks for answers again.
const DUE_AT_ONCE: usize = 1024;

/// The time between two looks at the times of all slots. It is a tenth of the timeout, if that is shorter.
const SWEEP: Duration = Duration::from_millis(50);

/// The time between a failure of a connection and the next attempt. It is long enough not to flood a service that is down,
/// and short enough to find a restarted service quickly.
const REOPEN_PAUSE: Duration = Duration::from_millis(100);

/// After this many failures with no answer between them a slot gives up.
pub(crate) const FAILURES_IN_ROW: u32 = 10;

/// How long a half-closed connection waits for the peer's end. Data that is still on its way arrives sooner.
const LINGER: Duration = Duration::from_secs(1);

const ALARM: Token = Token(usize::MAX);

/// One thread's part of a run.
pub(super) struct Engine<'run> {
    plan: &'run Plan,
    shared: &'run Shared<'run>,
    dial: &'run Dial,
    live: &'run Live,
    poll: Poll,
    slots: Vec<Slot>,
    /// Slots with more to read, which the kernel does not report again. Each slot is in it at most once.
    again: VecDeque<usize>,
    buffer: Box<[u8]>,
    pace: Option<(Schedule, Alarm)>,
    phase: Phase,
    /// When counting begins, and when the run is to end. Both are set when it begins.
    count_from_ns: u64,
    end_ns: u64,
    /// When the thread stopped sending. Set when it begins to settle.
    ended_ns: u64,
    /// Messages that may still be begun, without those of the warm-up.
    left: u64,
    sweep_ns: u64,
    tally: Tally,
    ready: Meeting<'run>,
    finished: Meeting<'run>,
    settled: Meeting<'run>,
}

impl<'run> Engine<'run> {
    pub(super) fn new(
        plan: &'run Plan,
        shared: &'run Shared<'run>,
        dial: &'run Dial,
        thread: usize,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        let slots = plan.share(thread);
        let pace = match plan.rate {
            None => None,
            Some(rate) => {
                let schedule = Schedule::new(rate, plan.connections, (thread, plan.threads), slots);
                Some((schedule, Alarm::new(poll.registry(), ALARM)?))
            }
        };
        Ok(Engine {
            plan,
            shared,
            dial,
            live: &shared.live[thread],
            poll,
            slots: std::iter::repeat_with(|| Slot::new(plan.seed, plan.pipeline)).take(slots).collect(),
            again: VecDeque::with_capacity(slots),
            buffer: vec![0; PIECE].into_boxed_slice(),
            pace,
            phase: Phase::Opening { until_ns: 0 },
            count_from_ns: u64::MAX,
            end_ns: u64::MAX,
            ended_ns: u64::MAX,
            left: plan.messages(thread),
            sweep_ns: 0,
            tally: Tally::new(),
            ready: Meeting::at(&shared.ready),
            finished: Meeting::at(&shared.finished),
            settled: Meeting::at(&shared.settled),
        })
    }

    /// Runs to the end of the last phase.
    pub(super) fn run(mut self) -> io::Result<Tally> {
        let mut events = Events::with_capacity(EVENTS);
        self.sweep(self.shared.now_ns());
        self.phase = Phase::Opening { until_ns: later(self.shared.now_ns(), OPENING) };
        while !self.advance(self.shared.now_ns()) {
            self.wait(&mut events)?;
            for event in &events {
                if event.token() != ALARM {
                    self.on_event(event);
                }
            }
            for _ in 0..self.again.len() {
                let slot = self.again.pop_front().expect("as many as counted");
                self.slots[slot].again = false;
                self.receive(slot, true);
            }
            let now_ns = self.shared.now_ns();
            self.begin_due(now_ns);
            if now_ns >= self.sweep_ns {
                self.sweep(now_ns);
            }
        }
        Ok(self.tally)
    }

    /// Sleeps until something happens or is due.
    fn wait(&mut self, events: &mut Events) -> io::Result<()> {
        let now_ns = self.shared.now_ns();
        let phase_ns = match self.phase {
            Phase::Opening { until_ns } | Phase::Settling { until_ns } => until_ns,
            // The slots of this thread have given up, and those of another have not.
            Phase::Running if self.finished.is_told() => self.end_ns.min(later(now_ns, OTHERS)),
            Phase::Running => self.end_ns,
            Phase::Ready | Phase::Settled => later(now_ns, OTHERS),
            Phase::Closing => u64::MAX,
        };
        let mut until_ns = if self.again.is_empty() { phase_ns.min(self.sweep_ns) } else { now_ns };
        if let Some((schedule, alarm)) = &mut self.pace
            && self.phase == Phase::Running
        {
            let due_ns = schedule.next_ns();
            if due_ns <= now_ns {
                until_ns = now_ns;
            } else if due_ns < until_ns {
                alarm.set(due_ns, now_ns)?;
            }
        }
        let timeout = Duration::from_nanos(until_ns.saturating_sub(now_ns));
        match self.poll.poll(events, Some(timeout)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                events.clear();
                Ok(())
            }
            outcome => outcome,
        }
    }

    // Events.

    fn on_event(&mut self, event: &Event) {
        let Token(place) = event.token();
        match self.slots[place].stage {
            Stage::Connecting { .. } => {
                // Either it is open, or the socket has an error.
                let now_ns = self.shared.now_ns();
                match self.slots[place].connected() {
                    Ok(silent_since_ns) => self.on_connection(silent_since_ns, now_ns),
                    Err(failure) => return self.fail(place, failure),
                }
                self.proceed(place, now_ns);
            }
            Stage::Open if event.is_writable() && self.slots[place].talk.owes() => self.send(place),
            Stage::Open | Stage::Closing { .. } => {}
            Stage::Down { .. } | Stage::Over => return,
        }
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            self.receive(place, event.is_read_closed() || event.is_error());
        }
    }

    /// Counts a connection that was made. It may have ended a silence.
    fn on_connection(&mut self, silent_since_ns: Option<u64>, now_ns: u64) {
        self.tally.opened += 1;
        if self.phase.counts()
            && let Some(since_ns) = silent_since_ns
        {
            self.note_silence(since_ns, now_ns);
        }
    }

    fn receive(&mut self, place: usize, to_the_end: bool) {
        let Engine { slots, buffer, tally, shared, phase, count_from_ns, .. } = self;
        let slot = &mut slots[place];
        let closing = matches!(slot.stage, Stage::Closing { .. });
        if !closing && slot.stage != Stage::Open {
            return;
        }
        // An answer that was written off does not count, even if it comes later.
        let counts = phase.counts();
        let answered = slot.talk.answered;
        let (mut longest_ns, mut heard_ns) = (None, None);
        let received = slot.receive(
            buffer,
            to_the_end,
            || *heard_ns.insert(shared.now_ns()),
            |since_ns, now_ns| {
                if counts {
                    longest_ns = longest_ns.max(silence_ns(since_ns, now_ns, *count_from_ns));
                }
            },
            |asked, now_ns| {
                if counts && asked.since_ns >= *count_from_ns {
                    tally.answer(asked.bytes, asked.since_ns, now_ns);
                }
            },
        );
        let now_ns = match received {
            Ok(Received::End) => shared.now_ns(),
            _ => heard_ns.unwrap_or_else(|| shared.now_ns()),
        };
        if slot.talk.answered > answered {
            slot.failures = 0;
        }
        if let Some(longest_ns) = longest_ns {
            tally.silence(longest_ns);
        }
        match received {
            Ok(Received::End) if closing => self.ended(place, now_ns),
            // The peer was the first to close, after its answer.
            Ok(Received::End)
                if self.plan.churn && slot.talk.answered > 0 && slot.talk.waiting().is_empty() =>
            {
                self.note_answered(place);
                self.ended(place, now_ns);
            }
            Ok(Received::End) => self.fail(place, Failure::ClosedEarly),
            Ok(Received::Drained) => self.proceed(place, now_ns),
            Ok(Received::More) => {
                if !std::mem::replace(&mut slot.again, true) {
                    self.again.push_back(place);
                }
                self.proceed(place, now_ns);
            }
            // Every answer had come.
            Err(Bad::Socket(_)) if closing => self.ended(place, now_ns),
            Err(Bad::Socket(failure)) => self.fail(place, failure),
            Err(Bad::Bytes { from, to }) => {
                let attempted = shared.attempted.load(Ordering::Relaxed);
                tally.mismatch(slot.talk.explain(&buffer[from..to], attempted));
                self.fail(place, Failure::Mismatch);
            }
        }
    }

    fn send(&mut self, place: usize) {
        if let Err(failure) = self.slots[place].send(&mut self.buffer) {
            self.fail(place, failure);
        }
    }

    // What a slot does next.

    /// Begins as many messages on an open connection as it may have on their way, and sends them. With churn, it closes the
    /// connection when its only message is back.
    fn proceed(&mut self, place: usize, now_ns: u64) {
        if self.slots[place].stage != Stage::Open {
            return;
        }
        if self.plan.churn {
            let talk = &self.slots[place].talk;
            if talk.asked > 0 && talk.waiting().is_empty() && self.phase != Phase::Settled {
                self.note_answered(place);
                return self.slots[place].half_close(later(now_ns, LINGER));
            }
        } else if self.phase == Phase::Running {
            while self.slots[place].talk.waiting().len() < self.plan.pipeline {
                let Some(since_ns) = self.claim(place, now_ns) else { break };
                self.slots[place].ask(&self.plan.sizes, since_ns, now_ns);
            }
        }
        if self.slots[place].talk.owes() {
            self.send(place);
        }
    }

    /// Claims the right to begin a message on this slot. Returns the time from which its latency counts.
    fn claim(&mut self, place: usize, now_ns: u64) -> Option<u64> {
        let slot = &mut self.slots[place];
        let since_ns = match &self.pace {
            None => now_ns,
            Some(_) if slot.turns_begun == slot.turns_due => return None,
            Some((schedule, _)) => schedule.due_ns(place, slot.turns_begun),
        };
        if self.left == 0 || since_ns >= self.end_ns {
            return None;
        }
        if since_ns >= self.count_from_ns {
            self.left -= 1;
        }
        slot.turns_begun += 1;
        Some(since_ns)
    }

    /// Begins the messages that are due by the schedule, on connections that may have one more on its way.
    fn begin_due(&mut self, now_ns: u64) {
        if self.phase != Phase::Running {
            return;
        }
        for _ in 0..DUE_AT_ONCE {
            let Some((schedule, _)) = &mut self.pace else { return };
            let Some(place) = schedule.take(now_ns) else { return };
            self.slots[place].turns_due += 1;
            self.slots[place].silence.want_answer(now_ns);
            match self.slots[place].stage {
                Stage::Open => self.proceed(place, now_ns),
                Stage::Down { open_at_ns } if open_at_ns <= now_ns => self.open(place, now_ns),
                _ => {}
            }
        }
    }

    /// Opens a slot's next connection. With churn, only together with a message.
    fn open(&mut self, place: usize, now_ns: u64) {
        let claimed = if self.plan.churn {
            match self.claim(place, now_ns) {
                None => return,
                since_ns => since_ns,
            }
        } else {
            None
        };
        let slot = &mut self.slots[place];
        let opened =
            slot.open((self.dial, self.shared.number()), (self.poll.registry(), Token(place)), now_ns);
        if let Some(since_ns) = claimed {
            slot.ask(&self.plan.sizes, since_ns, now_ns);
        }
        if let Err(failure) = opened {
            self.fail(place, failure);
        }
    }

    /// Closes a connection on which nothing failed. The slot opens the next one at once.
    fn ended(&mut self, place: usize, now_ns: u64) {
        let then =
            if self.phase == Phase::Running { Stage::Down { open_at_ns: now_ns } } else { Stage::Over };
        self.slots[place].close(then);
        if self.phase == Phase::Running {
            self.open(place, now_ns);
        }
    }

    /// Counts the failure, and closes the connection.
    fn fail(&mut self, place: usize, failure: Failure) {
        let now_ns = self.shared.now_ns();
        if matches!(self.phase, Phase::Settled | Phase::Closing) && failure != Failure::Mismatch {
            // The answers that it owed are counted already.
            return self.slots[place].close(Stage::Over);
        }
        self.tally.fail(failure);
        // Messages that were written off, and those that were answered, have been noted.
        let noted = matches!(self.phase, Phase::Settled | Phase::Closing)
            || matches!(self.slots[place].stage, Stage::Closing { .. });
        if !noted {
            self.note_lost(place, now_ns);
            self.note_answered(place);
        }
        if self.phase.opens() {
            self.reopen_later(place, now_ns);
        } else {
            if !noted && let Some(since_ns) = self.slots[place].silence.since_ns() {
                self.note_silence(since_ns, now_ns);
            }
            self.slots[place].close(Stage::Over);
        }
    }

    /// Closes a connection that failed. The slot opens the next one after a pause, or gives up.
    fn reopen_later(&mut self, place: usize, now_ns: u64) {
        let slot = &mut self.slots[place];
        if self.plan.rate.is_none() && self.phase == Phase::Running {
            slot.silence.want_answer(now_ns);
        } else if !self.plan.churn {
            // With churn and a rate, a slot wants a connection only when a message is due.
            slot.silence.want_connection(now_ns);
        }
        slot.failures += 1;
        if slot.failures < FAILURES_IN_ROW {
            slot.close(Stage::Down { open_at_ns: later(now_ns, REOPEN_PAUSE) });
        } else {
            self.tally.given_up += 1;
            slot.close(Stage::Over);
        }
    }

    // Notes.

    /// Notes a silence that has ended, or lasts to the end of the run.
    fn note_silence(&mut self, since_ns: u64, until_ns: u64) {
        if let Some(silence_ns) = silence_ns(since_ns, until_ns, self.count_from_ns) {
            self.tally.silence(silence_ns);
        }
    }

    /// Notes the messages of a connection whose answers will not come any more.
    fn note_lost(&mut self, place: usize, now_ns: u64) {
        let counted = |since_ns: &u64| *since_ns >= self.count_from_ns;
        let waiting = self.slots[place].talk.waiting().iter();
        for since_ns in waiting.map(|asked| asked.since_ns).filter(counted) {
            if self.phase == Phase::Running {
                self.tally.lose(since_ns);
            } else {
                self.tally.lose_after_the_end(since_ns, now_ns);
            }
        }
    }

    /// Notes whether a connection was ever answered. Called once for each connection that ends.
    fn note_answered(&mut self, place: usize) {
        let talk = &self.slots[place].talk;
        if talk.asked > 0 && matches!(self.slots[place].stage, Stage::Open) {
            self.tally.asked += 1;
            self.tally.never_answered += u64::from(talk.answered == 0);
        }
    }

    // Times.

    /// Looks at every slot's times, and publishes how far the thread is.
    fn sweep(&mut self, now_ns: u64) {
        self.sweep_ns = later(now_ns, SWEEP.min(self.plan.timeout / 10).max(Duration::from_millis(1)));
        let expired = |since_ns: u64| now_ns >= later(since_ns, self.plan.timeout);
        let mut open = 0;
        for place in 0..self.slots.len() {
            let slot = &mut self.slots[place];
            match slot.stage {
                Stage::Down { open_at_ns } if open_at_ns <= now_ns => self.open_if_asked_to(place),
                Stage::Connecting { since_ns } if expired(since_ns) => {
                    self.fail(place, Failure::ConnectTimeout);
                }
                Stage::Open => {
                    open += 1;
                    if slot.wants() && expired(slot.timeout_from_ns) && self.phase != Phase::Settled {
                        self.fail(place, Failure::AnswerTimeout);
                    }
                }
                Stage::Closing { until_ns } if until_ns <= now_ns => self.ended(place, now_ns),
                _ => {}
            }
        }
        self.live.open.store(open, Ordering::Relaxed);
        self.live.failures.store(self.tally.failed(), Ordering::Relaxed);
        self.live.messages.store(self.tally.messages(), Ordering::Relaxed);
    }

    fn open_if_asked_to(&mut self, place: usize) {
        // Opening many connections takes a while, and the last of them began later than the sweep.
        let now_ns = self.shared.now_ns();
        match self.phase {
            Phase::Opening { .. } | Phase::Ready if !self.plan.churn => self.open(place, now_ns),
            Phase::Running => self.open(place, now_ns),
            _ => {}
        }
    }
}

/// How long a silence was, without what lies before counting began. `None` if all of it does.
fn silence_ns(since_ns: u64, until_ns: u64, count_from_ns: u64) -> Option<u64> {
    (until_ns > count_from_ns).then(|| until_ns.saturating_sub(since_ns.max(count_from_ns)))
}

/// The time `by` after `from_ns`, or `u64::MAX` if that is later than a `u64` can tell.
pub(super) fn later(from_ns: u64, by: Duration) -> u64 {
    from_ns.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_counts_from_the_end_of_the_warm_up() {
        assert_eq!(silence_ns(30, 90, 10), Some(60));
        assert_eq!(silence_ns(30, 90, 50), Some(40));
        assert_eq!(silence_ns(30, 51, 50), Some(1));
        assert_eq!(silence_ns(30, 50, 50), None, "all of it was in the warm-up");
        assert_eq!(silence_ns(30, 90, u64::MAX), None, "the run has not begun");
        assert_eq!(silence_ns(95, 90, 50), Some(0), "it began after the end of the run");
    }
}
