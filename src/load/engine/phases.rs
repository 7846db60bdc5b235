//! A thread's way through its phases, and where threads wait for each other. What the phases are for stands in
//! [`load`](crate::load).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::super::plan::Until;
use super::super::report::Failure;
use super::super::slot::{Slot, Stage};
use super::{Engine, LINGER, later};

/// The most that the first message waits for all connections to be open, once all have been begun: longer than the
/// second that the kernel takes to knock again where a backlog was full.
pub(super) const OPENING: Duration = Duration::from_secs(2);

/// The least and, in multiples of the slowest answer so far, the usual time that answers are waited for when
/// the time of a run is over. It is never more than the timeout.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
const LAST_ANSWERS_FACTOR: u32 = 2;

/// While other threads are not as far as this one, they are looked at this often.
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

/// A point that threads wait for each other at. Each tells the others once that it is there, at the latest when it
/// is gone, so that nobody waits for one that failed.
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
    /// Goes on to the next phase when this one is over. True at the end of the last.
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
                let over = |slot: &Slot| slot.stage == Stage::Over;
                if now_ns >= self.end_ns
                    || self.left == 0
                    || self.shared.stopped()
                    || self.slots.iter().all(over)
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
            // Silence in the opening was nobody's fault, and beginning many messages takes a while.
            let now_ns = self.shared.now_ns();
            self.slots[slot].silent_since_ns = now_ns;
            if self.slots[slot].stage == Stage::Open {
                self.proceed(slot, now_ns);
            }
        }
        self.sweep(now_ns);
    }

    fn begin_settling(&mut self, now_ns: u64) {
        // What was due before the end is not late yet, though the end is here.
        self.begin_due(now_ns);
        // Counting may not have begun.
        let ended_ns = now_ns.min(self.end_ns).max(self.count_from_ns.min(now_ns));
        self.tally.span_ns = Some((self.count_from_ns.min(now_ns), ended_ns));
        if let Some((schedule, _)) = &mut self.pace {
            // With a number of messages, those beyond it are not due.
            while self.left > 0
                && let Some(slot) = schedule.take(ended_ns.saturating_sub(1))
            {
                self.slots[slot].turns_due += 1;
            }
            let overdue = |(place, slot): (usize, &Slot)| {
                let counted =
                    |turn: &u64| (self.count_from_ns..ended_ns).contains(&schedule.due_ns(place, *turn));
                (slot.turns_begun..slot.turns_due).filter(counted).count() as u64
            };
            self.tally.overdue = self.slots.iter().enumerate().map(overdue).sum::<u64>().min(self.left);
        }
        let patience = match self.plan.until {
            Until::Count(_) if !self.shared.stopped() => self.plan.timeout,
            _ => (self.tally.slowest() * LAST_ANSWERS_FACTOR).max(LAST_ANSWERS).min(self.plan.timeout),
        };
        self.phase = Phase::Settling { until_ns: later(now_ns, patience) };
        for slot in &mut self.slots {
            if matches!(slot.stage, Stage::Down { .. }) {
                slot.stage = Stage::Over;
            }
        }
    }

    /// Writes off what has not come.
    fn settle(&mut self, now_ns: u64) {
        for place in 0..self.slots.len() {
            if self.slots[place].wants() {
                self.tally.fail(Failure::Unanswered);
                self.note_silence(place, now_ns);
                self.note_lost(place);
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
