//! Messages that were lost. Only the end of the run tells how long each has waited at least.
//!
//! Only their times are kept, in steps of [`STEP_NS`], so that memory does not grow with the messages. If more than
//! [`TIMES_MAX`] steps have messages, the steps become twice as long. Times are rounded up to the step, so a wait may
//! be told too short by a step, and never too long.

use std::collections::BTreeMap;

/// The step at the start: a millisecond, which is short beside the pause before a reconnect.
const STEP_NS: u64 = 1_000_000;

/// Steps that are told apart: a wait is then exact to a 4096th of the run or better.
const TIMES_MAX: usize = 8192;

/// The times at which lost messages were due.
#[derive(Debug)]
pub(super) struct Unanswered {
    step_ns: u64,
    /// How many were due by the end of a step, and after the step before it.
    due: BTreeMap<u64, u64>,
}

impl Unanswered {
    pub(super) fn new() -> Self {
        Unanswered { step_ns: STEP_NS, due: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, due_ns: u64) {
        *self.due.entry(due_ns.div_ceil(self.step_ns)).or_default() += 1;
        while self.due.len() > TIMES_MAX {
            self.step_ns *= 2;
            for (step, count) in std::mem::take(&mut self.due) {
                *self.due.entry(step.div_ceil(2)).or_default() += count;
            }
        }
    }

    /// Takes all of them out. Each item is a wait until `end_ns`, and how many messages have waited at least that long.
    pub(super) fn take(&mut self, end_ns: u64) -> impl Iterator<Item = (u64, u64)> {
        let step_ns = self.step_ns;
        let due = std::mem::take(&mut self.due);
        due.into_iter().map(move |(step, count)| (end_ns.saturating_sub(step.saturating_mul(step_ns)), count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    #[test]
    fn each_has_waited_from_when_it_was_due_to_the_end() {
        let mut unanswered = Unanswered::new();
        [2 * STEP_NS, 5 * STEP_NS, 5 * STEP_NS - 1, 5 * STEP_NS + 1]
            .into_iter()
            .for_each(|due| unanswered.add(due));
        let waits: Vec<_> = unanswered.take(10 * STEP_NS).collect();
        assert_eq!(waits, [(8 * STEP_NS, 1), (5 * STEP_NS, 2), (4 * STEP_NS, 1)]);
        assert_eq!(unanswered.take(10 * STEP_NS).count(), 0, "each counts once");
    }

    #[test]
    fn memory_is_bounded_and_no_wait_is_told_too_long() {
        let mut unanswered = Unanswered::new();
        let (all, end_ns) = (100_000, 1000 * SECOND_NS);
        let due = |message: u64| message * (end_ns / all);
        (0..all).for_each(|message| unanswered.add(due(message)));
        assert!(unanswered.due.len() <= TIMES_MAX, "{}", unanswered.due.len());
        let mut waits: Vec<u64> = unanswered
            .take(end_ns)
            .flat_map(|(wait, count)| vec![wait; usize::try_from(count).expect("few")])
            .collect();
        waits.sort_unstable_by(|one, other| other.cmp(one));
        assert_eq!(waits.len() as u64, all);
        for (message, wait) in (0..all).zip(waits) {
            let right = end_ns - due(message);
            assert!(wait <= right && right - wait <= end_ns / 4096, "{wait} for {right}");
        }
    }
}
