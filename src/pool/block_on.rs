//! A future driven on the calling thread.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use super::current;

/// Drives a future to its end on the calling thread, which it blocks meanwhile. It has no timeout.
///
/// In a job, prefer it to the `block_on` of an executor. While it runs on a worker, a [`JobHandle`](crate::JobHandle)
/// of the same pool that is polled runs its job if that is still queued, as [`join`](crate::JobHandle::join) does, and
/// [`Pool::submit_async`](crate::Pool::submit_async) does not wait for room that only this worker could make.
///
/// ```
/// # let pool = millpond::Pool::builder("doc").workers(1).build()?;
/// let sum = millpond::block_on(async {
///     let one = pool.submit_async(|| 1).await?;
///     let two = pool.submit_async(|| 2).await?;
///     Ok::<_, Box<dyn std::error::Error>>(one.await? + two.await?)
/// })?;
/// assert_eq!(sum, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Panics
///
/// If the future does.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let signal = Arc::new(Signal { thread: thread::current(), woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&signal));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = current::with_block_on(|| future.as_mut().poll(&mut context)) {
            return output;
        }
        // The future may have used up an unpark that was meant for this.
        while !signal.woken.swap(false, Ordering::AcqRel) {
            thread::park();
        }
    }
}

struct Signal {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}
