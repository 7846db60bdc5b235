//! A thread's way through its phases, and the points where threads wait for each other. [`load`](crate::load) says what
//! the phases are for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::super::plan::Until;
use super::super::report::Failure;
use super::super::slot::{Slot, Stage};
use super::{Engine, LINGER, later};

/// The longest time that the first message waits for all connections to be open, once all have been begun. If a listen
/// queue is full, the kernel tries again after a second, so this is longer than that.
pub(super) const OPENING: Duration = Duration::from_secs(2);

/// When the time of a run is over, the thread waits this long for answers, or this many times the slowest answer so
/// far. The longer of the two counts, but the thread never waits longer than the timeout.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
const LAST_ANSWERS_FACTOR: u32 = 2;

/// The time between two looks at the other threads, while this one waits for them.
pub(super) const OTHERS: Duration = Duration::from_millis(5);

/// How far a thread is; see [`load`](crate::load).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Opening { until_ns: u64 },
    Ready,
    Running,
    Settling { until_ns: u64 },
    Settled,
    Closing,
}

impl Phase {
    /// Whether answers and silences count.
    pub(super) fn counts(self) -> bool {
        matches!(self, Phase::Running | Phase::Settling { .. })
    }

    /// Whether a slot opens another connection when one has failed.
    pub(super) fn opens(self) -> bool {
        matches!(self, Phase::Opening { .. } | Phase::Ready | Phase::Running)
    }
}

/// A point at which threads wait for each other. Each thread tells the others once that it is there, and at the latest
/// when it ends. Therefore no thread waits for one that failed.
pub(super) struct Meeting<'run> {
    there: &'run AtomicUsize,
    told: bool,
}

impl<'run> Meeting<'run> {
    pub(super) fn at(there: &'run AtomicUsize) -> Self {
        Meeting { there, told: false }
    }

    pub(super) fn tell(&mut self) {
        if !std::mem::replace(&mut self.told, true) {
            self.there.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether this thread is there.
    pub(super) fn is_told(&self) -> bool {
        self.told
    }

    /// Whether all threads are there.
    pub(super) fn is_complete(&self, threads: usize) -> bool {
        self.there.load(Ordering::Relaxed) >= threads
    }
}

impl Drop for Meeting<'_> {
    fn drop(&mut self) {
        self.tell();
    }
}

impl Engine<'_> {
    /// Goes on to the next phase if this one is over. Returns true at the end of the last.
    pub(super) fn advance(&mut self, now_ns: u64) -> bool {
        match self.phase {
            Phase::Opening { until_ns } => {
                let opening = |slot: &Slot| matches!(slot.stage, Stage::Connecting { .. });
                if self.plan.churn || now_ns >= until_ns || !self.slots.iter().any(opening) {
                    self.phase = Phase::Ready;
                    self.ready.tell();
                    return self.advance(now_ns);
                }
            }
            Phase::Ready => {
                if self.ready.is_complete(self.plan.threads) {
                    self.begin(now_ns);
                }
            }
            Phase::Running => {
                // If only this thread's slots have given up, the run goes on, and so do their silences.
                if !self.finished.is_told() && self.slots.iter().all(|slot| slot.stage == Stage::Over) {
                    self.finished.tell();
                }
                if now_ns >= self.end_ns
                    || self.left == 0
                    || self.shared.stopped()
                    || self.finished.is_complete(self.plan.threads)
                {
                    self.begin_settling(now_ns);
                }
            }
            Phase::Settling { until_ns } => {
                if now_ns >= until_ns || !self.slots.iter().any(Slot::wants) {
                    self.settle(now_ns);
                }
            }
            Phase::Settled => {
                if self.settled.is_complete(self.plan.threads) {
                    self.begin_closing(now_ns);
                }
            }
            Phase::Closing => return self.slots.iter().all(|slot| slot.stage == Stage::Over),
        }
        false
    }

    fn begin(&mut self, now_ns: u64) {
        self.phase = Phase::Running;
        self.count_from_ns = later(now_ns, self.plan.warmup);
        self.end_ns = match self.plan.until {
            Until::Time(time) => later(self.count_from_ns, time),
            Until::Count(_) => u64::MAX,
        };
        if let Some((schedule, _)) = &mut self.pace {
            schedule.begin(now_ns);
        }
        for slot in 0..self.slots.len() {
            // The time of the opening does not count. Beginning many messages takes a while.
            let now_ns = self.shared.now_ns();
            self.slots[slot].timeout_from_ns = now_ns;
            self.slots[slot].silence.restart(now_ns);
            if self.plan.rate.is_none() {
                self.slots[slot].silence.want_answer(now_ns);
            }
            if self.slots[slot].stage == Stage::Open {
                self.proceed(slot, now_ns);
            }
        }
        self.sweep(now_ns);
    }

    fn begin_settling(&mut self, now_ns: u64) {
        self.finished.tell();
        // A message that was due before the end can still be begun now, if its connection is free.
        self.begin_due(now_ns);
        self.ended_ns = now_ns.min(self.end_ns);
        // The run may have been stopped in the warm-up, before counting began.
        self.tally.span_ns =
            (self.count_from_ns < self.ended_ns).then_some((self.count_from_ns, self.ended_ns));
        let patience = match self.plan.until {
            Until::Count(_) if !self.shared.stopped() => self.plan.timeout,
            _ => (self.tally.slowest() * LAST_ANSWERS_FACTOR).max(LAST_ANSWERS).min(self.plan.timeout),
        };
        self.phase = Phase::Settling { until_ns: later(now_ns, patience) };
        self.tally.end(self.ended_ns);
        self.note_overdue();
        for slot in &mut self.slots {
            if matches!(slot.stage, Stage::Down { .. }) {
                slot.stage = Stage::Over;
            }
        }
    }

    /// Notes the messages that were due and have not been begun.
    fn note_overdue(&mut self) {
        let Some((schedule, _)) = &mut self.pace else { return };
        if self.left == 0 {
            return;
        }
        while let Some(slot) = schedule.take(self.ended_ns.saturating_sub(1)) {
            self.slots[slot].turns_due += 1;
        }
        let behind: Vec<usize> = (0..self.slots.len())
            .filter(|place| self.slots[*place].turns_begun < self.slots[*place].turns_due)
            .collect();
        let first = behind.iter().map(|place| self.slots[*place].turns_begun).min().unwrap_or(0);
        let end = behind.iter().map(|place| self.slots[*place].turns_due).max().unwrap_or(0);
        // With a number of messages, those beyond it are not due. The others are the first in the order of the
        // schedule, which is turn by turn and in each turn slot by slot.
        for turn in first..end {
            for place in &behind {
                let slot = &self.slots[*place];
                let due_ns = schedule.due_ns(*place, turn);
                if (slot.turns_begun..slot.turns_due).contains(&turn)
                    && (self.count_from_ns..self.ended_ns).contains(&due_ns)
                {
                    self.tally.overdue(due_ns, self.ended_ns);
                    self.left -= 1;
                    if self.left == 0 {
                        return;
                    }
                }
            }
        }
    }

    /// Writes off the answers and connections that have not come.
    fn settle(&mut self, now_ns: u64) {
        for place in 0..self.slots.len() {
            let wants = self.slots[place].wants();
            if wants {
                self.tally.fail(Failure::Unanswered);
                self.note_lost(place, now_ns);
            }
            if let Some(since_ns) = self.slots[place].silence.since_ns() {
                // A slot without a connection has tried nothing after the end of the run.
                self.note_silence(since_ns, if wants { now_ns } else { self.ended_ns });
            }
            self.note_answered(place);
        }
        self.phase = Phase::Settled;
        self.settled.tell();
    }

    fn begin_closing(&mut self, now_ns: u64) {
        self.phase = Phase::Closing;
        for slot in &mut self.slots {
            match slot.stage {
                Stage::Open => slot.half_close(later(now_ns, LINGER)),
                Stage::Closing { .. } => {}
                _ => slot.close(Stage::Over),
            }
        }
    }
}
