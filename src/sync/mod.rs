//! The types that the model checker replaces, and the policy on poisoned locks.
//!
//! The threads of a pool and those around a connection meet by types of this module: atomics, locks, threads, and the
//! waking of sleepers. So the code that a model run explores is the code that ships. Built with `--cfg millpond_loom`
//! they are loom's and the stand-ins of `stand_in.rs`, which says what is real in a model. Otherwise they are those of
//! std and event-listener.

#[cfg(millpond_loom)]
mod stand_in;

/// Atomics by which threads agree on what to do next. Those that only count or time, for readers of numbers, are std's.
pub(crate) mod atomic {
    #[cfg(millpond_loom)]
    pub(crate) use super::stand_in::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize};
    pub(crate) use std::sync::atomic::Ordering;
    #[cfg(not(millpond_loom))]
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize};
}

/// Sleepers, and the waking of them.
pub(crate) mod event {
    #[cfg(millpond_loom)]
    pub(crate) use super::stand_in::event::{Event, Listener};
    #[cfg(not(millpond_loom))]
    pub(crate) use event_listener::{Event, Listener};
}

/// Locks, also after a holder has panicked.
///
/// This is the crate's one policy on poisoning: what our locks guard is valid between any two statements, so
/// a panic elsewhere is no reason to fail here.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Locks and threads that the model checker can take over.
pub(crate) mod checked {
    use std::sync::PoisonError;
    use std::time::Duration;

    #[cfg(millpond_loom)]
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    #[cfg(not(millpond_loom))]
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

    /// See [`lock`](super::lock).
    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `condition` is no longer true, `timeout` at most.
    #[cfg(not(millpond_loom))]
    pub(crate) fn wait_while<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
        condition: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        condvar.wait_timeout_while(guard, timeout, condition).unwrap_or_else(PoisonError::into_inner).0
    }

    /// In a model there is no time, and the wait has no timeout.
    #[cfg(millpond_loom)]
    pub(crate) fn wait_while<'a, T>(
        condvar: &Condvar,
        mut guard: MutexGuard<'a, T>,
        _timeout: Duration,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        while condition(&mut guard) {
            guard = condvar.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        guard
    }

    pub(crate) mod thread {
        #[cfg(millpond_loom)]
        pub(crate) use crate::sync::stand_in::thread::{Builder, JoinHandle, park_timeout};
        #[cfg(millpond_loom)]
        pub(crate) use loom::thread::{Thread, current, park, yield_now};
        #[cfg(not(millpond_loom))]
        pub(crate) use std::thread::{Builder, JoinHandle, Thread, current, park, park_timeout, yield_now};
    }
}
