//! What falls due at some time, and the thread that waits for it.
//!
//! Entries are added by any thread. One thread, which the first entry starts, sleeps until the earliest is due, and
//! hands it on. An entry cannot be taken off; instead it is asked whether it still matters. When half of the entries
//! may no longer matter, all are asked, and those that do not are dropped. So the memory is bounded by the entries that
//! matter, and an entry costs a constant time on average.

use std::collections::BinaryHeap;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::sync::lock;

/// Entries below which none is asked whether it matters.
const SMALL: usize = 64;

/// See the module.
pub(crate) struct Agenda<E> {
    state: Mutex<State<E>>,
    /// Notified when the earliest entry has changed, and at the end.
    changed: Condvar,
}

struct State<E> {
    entries: BinaryHeap<Entry<E>>,
    /// How many entries mattered when they were last asked, or [`SMALL`].
    mattered: usize,
    has_thread: bool,
    over: bool,
}

struct Entry<E> {
    at: Instant,
    what: E,
}

// The heap's greatest is the earliest.
impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.at.cmp(&self.at)
    }
}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl<E> Eq for Entry<E> {}

impl<E> Agenda<E> {
    pub(crate) fn new() -> Self {
        let state = State { entries: BinaryHeap::new(), mattered: SMALL, has_thread: false, over: false };
        Agenda { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Adds an entry. `start` starts the thread, which calls [`run`](Agenda::run), and returns whether it could. If the
    /// system refuses the thread, nothing is handed on until a later entry can start it.
    pub(crate) fn add(
        &self,
        at: Instant,
        what: E,
        matters: impl Fn(&E) -> bool,
        start: impl FnOnce() -> bool,
    ) {
        // Dropped without the lock, because a destructor may be anything.
        let mut dropped = Vec::new();
        let mut state = lock(&self.state);
        if state.over {
            return;
        }
        if state.entries.len() >= 2 * state.mattered {
            let (live, dead): (Vec<_>, Vec<_>) =
                state.entries.drain().partition(|entry| matters(&entry.what));
            state.mattered = live.len().max(SMALL);
            state.entries = live.into();
            dropped = dead;
        }
        let is_earliest = state.entries.peek().is_none_or(|earliest| at < earliest.at);
        state.entries.push(Entry { at, what });
        let starts = !std::mem::replace(&mut state.has_thread, true);
        drop(state);
        drop(dropped);
        if starts && !start() {
            lock(&self.state).has_thread = false;
        } else if is_earliest {
            self.changed.notify_one();
        }
    }

    /// Hands on each entry when it is due, until the end. The thread's body.
    pub(crate) fn run(&self, hand_on: impl Fn(E)) {
        let mut state = lock(&self.state);
        while !state.over {
            let now = Instant::now();
            match state.entries.peek().map(|earliest| earliest.at) {
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) if at > now => {
                    let waited = self.changed.wait_timeout(state, at - now);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Some(_) => {
                    let entry = state.entries.pop();
                    drop(state);
                    entry.into_iter().for_each(|entry| hand_on(entry.what));
                    state = lock(&self.state);
                }
            }
        }
    }

    /// Drops all entries and ends the thread.
    pub(crate) fn end(&self) {
        let mut state = lock(&self.state);
        state.over = true;
        let entries = std::mem::take(&mut state.entries);
        drop(state);
        drop(entries);
        self.changed.notify_all();
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        lock(&self.state).entries.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn entries_are_handed_on_in_the_order_of_their_times() {
        let agenda = Agenda::new();
        let now = Instant::now();
        let (report, reports) = mpsc::channel();
        std::thread::scope(|scope| {
            let run = || {
                let report = report.clone();
                scope.spawn(|| {
                    agenda.run(move |what| report.send((what, Instant::now())).expect("it is received"));
                });
                true
            };
            let at = |ms| now + Duration::from_millis(ms);
            agenda.add(at(3_600_000), 'd', |_| true, run);
            for (ms, what) in [(60, 'c'), (20, 'a'), (40, 'b')] {
                agenda.add(at(ms), what, |_| true, || unreachable!("it has a thread"));
            }
            for (ms, what) in [(20, 'a'), (40, 'b'), (60, 'c')] {
                let (found, when) = reports.recv_timeout(Duration::from_secs(30)).expect("it is due");
                assert!(found == what && when >= at(ms), "{found} after {:?}", when - now);
            }
            agenda.end();
        });
        assert_eq!(agenda.len(), 0);
        agenda.add(now, 'e', |_| true, || unreachable!("it is over"));
        assert_eq!(agenda.len(), 0);
    }

    #[test]
    fn entries_that_no_longer_matter_take_bounded_memory() {
        let agenda = Agenda::new();
        let hour = Instant::now() + Duration::from_secs(3600);
        for number in 0..100_000_u32 {
            agenda.add(hour, number, |number| number % 1000 == 0, || true);
            assert!(agenda.len() <= 2 * (SMALL + 100), "{}", agenda.len());
        }
        let kept: Vec<_> = lock(&agenda.state)
            .entries
            .iter()
            .filter(|entry| entry.what % 1000 == 0)
            .map(|entry| entry.what)
            .collect();
        assert_eq!(kept.len(), 100, "each that matters is kept");
    }

    #[test]
    fn an_entry_without_a_thread_waits_for_the_next_that_starts_one() {
        let agenda = Agenda::new();
        let (report, reports) = mpsc::channel();
        std::thread::scope(|scope| {
            agenda.add(Instant::now(), 1, |_| true, || false);
            agenda.add(
                Instant::now(),
                2,
                |_| true,
                || {
                    let report = report.clone();
                    scope.spawn(|| agenda.run(move |what| report.send(what).expect("it is received")));
                    true
                },
            );
            let mut both =
                [(); 2].map(|()| reports.recv_timeout(Duration::from_secs(30)).expect("it is due"));
            both.sort_unstable();
            assert_eq!(both, [1, 2]);
            agenda.end();
        });
    }
}
