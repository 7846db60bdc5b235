//! What the model checker can take over, and the policy on poisoned locks.
//!
//! The connection's state machine (`server/gate.rs`) and the job's (`pool/job.rs`, with `crew.rs`, `current.rs`
//! and `handle.rs`) take their atomics, locks and threads from here, so that the code a model run explores is
//! the code that ships. Built with `--cfg millpond_loom` they are loom's, otherwise std's.

pub(crate) mod atomic {
    #[cfg(millpond_loom)]
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
    #[cfg(not(millpond_loom))]
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
}

/// Locks, whatever a panicking holder left behind.
///
/// This is the crate's one policy on poisoning: what our locks guard is valid between any two statements, so
/// a panic elsewhere is no reason to fail here.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Locks and parking that the model checker can take over.
pub(crate) mod checked {
    #[cfg(millpond_loom)]
    pub(crate) use loom::sync::{Mutex, MutexGuard};
    #[cfg(not(millpond_loom))]
    pub(crate) use std::sync::{Mutex, MutexGuard};

    /// See [`lock`](super::lock).
    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) mod thread {
        #[cfg(millpond_loom)]
        pub(crate) use loom::thread::{Thread, current, park};
        #[cfg(not(millpond_loom))]
        pub(crate) use std::thread::{Thread, current, park, park_timeout};

        /// In a model there is no time: a wait with an end looks again and again.
        #[cfg(millpond_loom)]
        pub(crate) fn park_timeout(_timeout: std::time::Duration) {
            loom::thread::yield_now();
        }
    }
}
