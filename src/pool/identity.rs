//! What every part of a pool knows of it, whatever the type of its jobs: its name, its stage, and what is counted by
//! other threads than its workers.
//!
//! # Stages
//!
//! The stage is *open*, then *closed*, then perhaps *aborted*, and never goes back. It is read without a lock. Whether
//! a submitter is admitted is decided under the queue's lock, so that every admitted job is in the queue when `close`
//! has returned.
//!
//! | stage | submitters | workers |
//! | --- | --- | --- |
//! | open | admitted if there is room | run jobs, sleep when there is none |
//! | closed | refused | run what is queued, then exit |
//! | aborted | refused | exit after the job they run |

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Instant;

use super::agenda::Agenda;
use super::crew::Crew;
use super::errors::quietly;
use super::places::Places;
use crate::sync::atomic::{AtomicU8, Ordering};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Stage {
    Open,
    Closed,
    Aborted,
}

/// Why a job ended without having been run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unrun {
    /// It was cancelled while it waited.
    Cancelled,
    /// It waited longer than its deadline.
    Expired,
    /// An abort took it out of the queue.
    Aborted,
}

/// A job that may wait too long.
pub(crate) trait Expires: Send + Sync {
    /// Ends the job if it waits beyond its deadline.
    fn expire(&self);
    /// Whether the job waits.
    fn is_queued(&self) -> bool;
}

/// See the module.
pub(crate) struct Identity {
    pub(crate) id: PoolId,
    pub(crate) name: String,
    pub(crate) crew: Crew,
    pub(crate) places: Arc<Places>,
    /// A [`Stage`].
    stage: AtomicU8,
    /// Jobs that ended unrun. Written by the threads that end them, read by readers of the numbers.
    cancelled: AtomicU64,
    expired: AtomicU64,
    aborted: AtomicU64,
    /// Jobs that run and wait until the pool is idle. Written by their workers.
    aside: AtomicU64,
    /// Jobs out of the queue that workers run beside their own. Written by those workers.
    beside: AtomicU64,
    deadlines: Agenda<Weak<dyn Expires>>,
}

/// Tells pools apart, those that are gone included.
pub(crate) type PoolId = u64;

/// All pools, by their numbers. A job knows its pool by its number only, because a count of references to the pool
/// would be written by each thread for each job. A pool is asked for here when a job ends unrun.
static POOLS: RwLock<BTreeMap<PoolId, Weak<Identity>>> = RwLock::new(BTreeMap::new());

/// The pool of this number, if it is not gone.
pub(crate) fn find(id: PoolId) -> Option<Arc<Identity>> {
    POOLS.read().unwrap_or_else(PoisonError::into_inner).get(&id)?.upgrade()
}

/// How many bytes of a thread's name Linux shows.
const SHOWN_NAME: usize = 15;

impl Identity {
    pub(crate) fn new(name: String) -> Arc<Self> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let pool = Arc::new(Identity {
            id: LAST.fetch_add(1, Ordering::Relaxed) + 1,
            name,
            crew: Crew::default(),
            places: Arc::default(),
            stage: AtomicU8::new(Stage::Open as u8),
            cancelled: AtomicU64::new(0),
            expired: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
            aside: AtomicU64::new(0),
            beside: AtomicU64::new(0),
            deadlines: Agenda::new(),
        });
        POOLS.write().unwrap_or_else(PoisonError::into_inner).insert(pool.id, Arc::downgrade(&pool));
        pool
    }

    pub(crate) fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Open,
            1 => Stage::Closed,
            _ => Stage::Aborted,
        }
    }

    /// Raises the stage.
    pub(crate) fn advance(&self, stage: Stage) {
        self.stage.fetch_max(stage as u8, Ordering::AcqRel);
    }

    /// Counts a job that ended unrun, and frees its place.
    pub(crate) fn count_unrun(&self, why: Unrun) {
        let count = match why {
            Unrun::Cancelled => &self.cancelled,
            Unrun::Expired => &self.expired,
            Unrun::Aborted => &self.aborted,
        };
        // First counted, then free: see `queue.rs`, the part on the bound.
        count.fetch_add(1, Ordering::AcqRel);
        self.places.free();
    }

    /// How many jobs ended unrun for this reason.
    pub(crate) fn unrun(&self, why: Unrun) -> u64 {
        match why {
            Unrun::Cancelled => &self.cancelled,
            Unrun::Expired => &self.expired,
            Unrun::Aborted => &self.aborted,
        }
        .load(Ordering::Acquire)
    }

    /// Counts jobs that the calling worker runs as waiting until the pool is idle, while `run` lasts.
    pub(crate) fn with_aside<R>(&self, jobs: u64, run: impl FnOnce() -> R) -> R {
        let _aside = Counting::new(&self.aside, jobs);
        self.places.idle.notify(usize::MAX);
        run()
    }

    /// How many jobs run and wait until the pool is idle.
    pub(crate) fn aside(&self) -> u64 {
        self.aside.load(Ordering::Acquire)
    }

    /// Counts a job out of the queue that the calling worker runs beside its own, until the guard is dropped.
    pub(crate) fn count_beside(&self) -> Counting<'_> {
        Counting::new(&self.beside, 1)
    }

    /// How many jobs out of the queue workers run beside their own. Each makes one job look as if it waited.
    pub(crate) fn beside(&self) -> u64 {
        self.beside.load(Ordering::Acquire)
    }

    /// The name of a thread of this pool: `mill-<pool>-<what>`, with the pool's name shortened so that all of `what` is
    /// within the bytes that Linux shows.
    pub(crate) fn thread_name(&self, what: impl std::fmt::Display) -> String {
        let what = what.to_string();
        let room = SHOWN_NAME.saturating_sub("mill--".len() + what.len());
        let end =
            (0..=room.min(self.name.len())).rev().find(|end| self.name.is_char_boundary(*end)).unwrap_or(0);
        format!("mill-{}-{what}", &self.name[..end])
    }

    /// Ends the job when its time is over, if it waits then. Starts a thread for that when there is none; if the system
    /// refuses it, the job ends when a worker comes to it.
    pub(crate) fn note_deadline(self: &Arc<Self>, at: Instant, job: Weak<dyn Expires>) {
        // Without a reference of its own: to drop the last one here would run the job's destructors under a lock.
        let matters = |job: &Weak<dyn Expires>| job.strong_count() > 0;
        self.deadlines.add(at, job, matters, || self.start_clock());
    }

    #[cfg(not(millpond_loom))]
    fn start_clock(self: &Arc<Self>) -> bool {
        let pool = Arc::clone(self);
        let body = move || {
            // Its destructors come from outside this crate, if this is the last reference.
            let expire = |job: Weak<dyn Expires>| job.upgrade().inspect(|job| job.expire());
            pool.deadlines.run(|job| quietly(|| drop(expire(job))));
        };
        std::thread::Builder::new().name(self.thread_name("time")).spawn(body).is_ok()
    }

    /// In a model there is no time.
    #[cfg(millpond_loom)]
    fn start_clock(self: &Arc<Self>) -> bool {
        false
    }

    /// Called by the last worker at its end.
    pub(crate) fn end_clock(&self) {
        self.deadlines.end();
    }
}

/// Adds to a count until it is dropped.
pub(crate) struct Counting<'a>(&'a AtomicU64, u64);

impl<'a> Counting<'a> {
    fn new(count: &'a AtomicU64, by: u64) -> Self {
        count.fetch_add(by, Ordering::AcqRel);
        Counting(count, by)
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::AcqRel);
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        POOLS.write().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_found_as_long_as_it_is_there() {
        let pool = Identity::new("found".to_owned());
        let id = pool.id;
        assert!(find(id).is_some_and(|found| found.name == "found"));
        drop(pool);
        assert!(find(id).is_none());
    }

    #[test]
    fn a_threads_name_shows_all_of_its_number() {
        let named = |name: &str, number: usize| Identity::new(name.to_owned()).thread_name(number);
        assert_eq!(named("sums", 3), "mill-sums-3");
        assert_eq!(named("payments", 3), "mill-payments-3");
        assert_eq!(named("payments", 127), "mill-paymen-127");
        assert_eq!(named("a-very-long-name", 9_999), "mill-a-ver-9999");
        assert_eq!(named("prüfungen", 10), "mill-prüfun-10");
        assert_eq!(named("prüü", 12_345_678), "mill-p-12345678");
        assert_eq!(named("", 0), "mill--0");
    }
}
