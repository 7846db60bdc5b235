//! A thread of the load generator: its slots, the events on them, and what each does next.
//!
//! The thread waits in one place, for all of its connections, and never longer than [`SWEEP`], because times are
//! looked at in a sweep over all slots. A message costs a read, a write and a share of a wait; nothing is
//! allocated for it, and nothing shared with other threads is touched.
//!
//! A connection that fails is opened anew after [`REOPEN_PAUSE`], until [`FAILURES_IN_ROW`] have failed in its
//! slot with no answer between them. When all slots have given up, the run is over.

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

/// Messages begun because they are due before answers have their turn again.
const DUE_AT_ONCE: usize = 1024;

/// Between two looks at the times of all slots; a tenth of the timeout, if that is shorter.
const SWEEP: Duration = Duration::from_millis(50);

/// Between a failure of a connection and the next attempt: no flood of attempts on a service that is down, and
/// a service that restarts is found again at once.
const REOPEN_PAUSE: Duration = Duration::from_millis(100);

/// Failures with no answer between them after which a slot gives up.
const FAILURES_IN_ROW: u32 = 10;

/// How long a half-closed connection waits for the peer's end. Data on its way arrives in less, or is not
/// going to.
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
    /// Slots with more to read, of which the kernel says nothing new. Each stands here at most once.
    again: VecDeque<usize>,
    buffer: Box<[u8]>,
    pace: Option<(Schedule, Alarm)>,
    phase: Phase,
    /// When counting begins and the run ends; set when it begins.
    count_from_ns: u64,
    end_ns: u64,
    /// Messages that may still be begun, not counting the warm-up's.
    left: u64,
    sweep_ns: u64,
    tally: Tally,
    ready: Meeting<'run>,
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
            left: plan.messages(thread),
            sweep_ns: 0,
            tally: Tally::new(),
            ready: Meeting::at(&shared.ready),
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
                // Either it is open, or there is an error to be had.
                if let Err(failure) = self.slots[place].connected() {
                    return self.fail(place, failure);
                }
                self.slots[place].stage = Stage::Open;
                self.proceed(place, self.shared.now_ns());
            }
            Stage::Open if event.is_writable() && self.slots[place].talk.owes() => self.send(place),
            Stage::Open | Stage::Closing { .. } => {}
            Stage::Down { .. } | Stage::Over => return,
        }
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            self.receive(place, event.is_read_closed() || event.is_error());
        }
    }

    fn receive(&mut self, place: usize, to_the_end: bool) {
        let Engine { slots, buffer, tally, shared, phase, count_from_ns, .. } = self;
        let slot = &mut slots[place];
        let closing = matches!(slot.stage, Stage::Closing { .. });
        if !closing && slot.stage != Stage::Open {
            return;
        }
        // What was written off stays so, though it comes after all.
        let counts = matches!(phase, Phase::Running | Phase::Settling { .. });
        let answered = slot.talk.answered;
        let (mut silence_ns, mut heard_ns) = (0, None);
        let received = slot.receive(
            buffer,
            to_the_end,
            || *heard_ns.insert(shared.now_ns()),
            |since_ns, now_ns| {
                silence_ns = silence_ns.max(now_ns.saturating_sub(since_ns.max(*count_from_ns)));
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
        if counts {
            tally.silence(silence_ns);
        }
        match received {
            Ok(Received::End) if closing => self.ended(place, now_ns),
            // The peer was the first to close, after all that there was to say.
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
            // All that was wanted had come.
            Err(Bad::Socket(_)) if closing => self.ended(place, now_ns),
            Err(Bad::Socket(failure)) => self.fail(place, failure),
            Err(Bad::Bytes { from, to }) => {
                let opened = shared.opened.load(Ordering::Relaxed);
                tally.mismatch(slot.talk.explain(&buffer[from..to], opened));
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

    /// Begins as many messages on an open connection as it may have on their way, and sends them; or closes it
    /// when its only message is back.
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

    /// The right to begin a message on this slot: when its time counts from.
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

    /// Begins the messages that the schedule says are due, on connections that have nothing on their way.
    fn begin_due(&mut self, now_ns: u64) {
        if self.phase != Phase::Running {
            return;
        }
        for _ in 0..DUE_AT_ONCE {
            let Some((schedule, _)) = &mut self.pace else { return };
            let Some(place) = schedule.take(now_ns) else { return };
            self.slots[place].turns_due += 1;
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

    /// The connection is closed, and all was well.
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
            // What it owed is counted already.
            return self.slots[place].close(Stage::Over);
        }
        self.tally.fail(failure);
        // Those written off and those answered have been noted.
        let noted = matches!(self.phase, Phase::Settled | Phase::Closing)
            || matches!(self.slots[place].stage, Stage::Closing { .. });
        if !noted {
            if self.slots[place].wants() {
                self.note_silence(place, now_ns);
            }
            self.note_lost(place);
            self.note_answered(place);
        }
        let slot = &mut self.slots[place];
        slot.failures += 1;
        let again = matches!(self.phase, Phase::Opening { .. } | Phase::Ready | Phase::Running);
        slot.close(if again && slot.failures < FAILURES_IN_ROW {
            Stage::Down { open_at_ns: later(now_ns, REOPEN_PAUSE) }
        } else {
            Stage::Over
        });
    }

    // Notes.

    /// The silence of a connection that is being given up, or is at its end.
    fn note_silence(&mut self, place: usize, now_ns: u64) {
        let since_ns = self.slots[place].silent_since_ns.max(self.count_from_ns);
        self.tally.silence(now_ns.saturating_sub(since_ns));
    }

    /// The messages whose answers will not come any more.
    fn note_lost(&mut self, place: usize) {
        let counted = |since_ns: u64| since_ns >= self.count_from_ns;
        let waiting = self.slots[place].talk.waiting().iter();
        self.tally.lost += waiting.filter(|asked| counted(asked.since_ns)).count() as u64;
    }

    /// Whether the connection was ever answered. Once for each that ends.
    fn note_answered(&mut self, place: usize) {
        let talk = &self.slots[place].talk;
        if talk.asked > 0 && matches!(self.slots[place].stage, Stage::Open) {
            self.tally.asked += 1;
            self.tally.never_answered += u64::from(talk.answered == 0);
        }
    }

    // Times.

    /// Looks at every slot's times, and tells how far the thread is.
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
                    if slot.wants() && expired(slot.silent_since_ns) && self.phase != Phase::Settled {
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
        // Opening many takes a while, which is not to be charged to the last of them.
        let now_ns = self.shared.now_ns();
        match self.phase {
            Phase::Opening { .. } | Phase::Ready if !self.plan.churn => self.open(place, now_ns),
            Phase::Running => self.open(place, now_ns),
            _ => {}
        }
    }
}

/// The time `by` after `from_ns`; what does not fit is the end of all time.
pub(super) fn later(from_ns: u64, by: Duration) -> u64 {
    from_ns.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX))
}
