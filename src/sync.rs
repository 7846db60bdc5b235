//! The atomics that the model checker can take over.
//!
//! The connection's state machine (`server/gate.rs`) takes its atomics from here, so that the code a model
//! run explores is the code that ships. Built with `--cfg millpond_loom` they are loom's, otherwise std's.

pub(crate) mod atomic {
    #[cfg(millpond_loom)]
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    #[cfg(not(millpond_loom))]
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
}

/// Locks, whatever a panicking holder left behind.
///
/// This is the crate's one policy on poisoning: what our locks guard is valid between any two statements, so
/// a panic elsewhere is no reason to fail here.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
