//! Stand-ins, in a model, for what loom cannot take over.
//!
//! A model runs the pool's own code, and all of it: admission, the two buffers of the queue, sleeping and waking, the
//! cascade, waiting for room, the worker's loop and the helper's, nested jobs, close, drain, abort and resize. loom
//! runs its threads one step at a time, in every order that matters, and reports a thread that sleeps for ever as a
//! deadlock. Three things are not the real ones:
//!
//! - **The sleepers** ([`event`]), in place of `event_listener::Event`. As in version 5.4 it is a list under a lock,
//!   which every call takes. `notify(n)` raises the number of notified listeners to `n`, counting those that were
//!   notified before and have not removed themselves. The first to listen is the first to be notified. A notified
//!   listener that is dropped notifies the next. Threads sleep by parking, and look again when they awake. A wait with
//!   a deadline may end at any step, so that a notification and the deadline meet in every order.
//! - **Sequentially consistent atomics** ([`atomic`]). loom takes `SeqCst` accesses for acquire and release, and would
//!   report lost wake-ups that cannot happen. But it has `SeqCst` fences in full. So a fence stands before each such
//!   load, after each such store and around each such read-modify-write. That forbids what the standard forbids.
//!   *Stronger*: the fences order weaker accesses beside them as well, so an ordering chosen too weak is not always
//!   seen. The atomics of a connection's state and of the pool's queue use none and are loom's as they are.
//! - **Time.** There is none: a wait with a timeout looks again and again or ends at any step, drains have no deadline,
//!   and no thread waits for the deadlines of jobs.
//!
//! The checker does not see what only counts or times, for readers of numbers: workers' cells, rejections. Two waits
//! read those counts: the last loop of an abort, which yields until the numbers are complete, and the wait for an idle
//! pool.

pub(crate) mod atomic {
    #![expect(dead_code, reason = "each is a whole atomic, and not every method is used")]

    use std::sync::atomic::Ordering;

    use loom::sync::atomic::fence;

    /// Wraps one of loom's atomics, with the read-modify-writes that are used.
    macro_rules! atomic {
        ($name:ident, $value:ty, $($modify:ident)*) => {
            #[derive(Debug, Default)]
            pub(crate) struct $name(loom::sync::atomic::$name);

            impl $name {
                pub(crate) fn new(value: $value) -> Self {
                    $name(loom::sync::atomic::$name::new(value))
                }

                #[track_caller]
                pub(crate) fn load(&self, order: Ordering) -> $value {
                    fence_if_seq_cst(order);
                    self.0.load(order)
                }

                #[track_caller]
                pub(crate) fn store(&self, value: $value, order: Ordering) {
                    self.0.store(value, order);
                    fence_if_seq_cst(order);
                }

                $(
                    #[track_caller]
                    pub(crate) fn $modify(&self, value: $value, order: Ordering) -> $value {
                        fence_if_seq_cst(order);
                        let before = self.0.$modify(value, order);
                        fence_if_seq_cst(order);
                        before
                    }
                )*

                #[track_caller]
                pub(crate) fn compare_exchange(
                    &self,
                    old: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    fence_if_seq_cst(success);
                    let outcome = self.0.compare_exchange(old, new, success, failure);
                    fence_if_seq_cst(success);
                    outcome
                }

                /// In a model it does not fail for no reason, because each caller tries again at once.
                #[track_caller]
                pub(crate) fn compare_exchange_weak(
                    &self,
                    old: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.compare_exchange(old, new, success, failure)
                }
            }
        };
    }

    atomic!(AtomicBool, bool, swap);
    atomic!(AtomicU8, u8, swap fetch_max);
    atomic!(AtomicU64, u64, fetch_add fetch_sub);
    atomic!(AtomicUsize, usize, fetch_add fetch_sub);

    fn fence_if_seq_cst(order: Ordering) {
        if order == Ordering::SeqCst {
            fence(Ordering::SeqCst);
        }
    }
}

pub(crate) mod event {
    use std::sync::atomic::Ordering;
    use std::time::Instant;

    use loom::sync::Mutex;
    use loom::sync::atomic::fence;
    use loom::thread::{self, Thread};

    use crate::sync::checked::lock;

    #[derive(Debug, Default)]
    pub(crate) struct Event {
        list: Mutex<List>,
    }

    #[derive(Debug, Default)]
    struct List {
        /// In the order in which they began to listen.
        entries: Vec<Entry>,
        last_number: u64,
    }

    #[derive(Debug)]
    struct Entry {
        number: u64,
        notified: bool,
        /// The thread to unpark, once it waits.
        thread: Option<Thread>,
    }

    impl List {
        fn notify(&mut self, count: usize) {
            let notified = self.entries.iter().filter(|entry| entry.notified).count();
            let more = count.saturating_sub(notified);
            for entry in self.entries.iter_mut().filter(|entry| !entry.notified).take(more) {
                entry.notified = true;
                if let Some(thread) = entry.thread.take() {
                    thread.unpark();
                }
            }
        }

        /// Takes a listener out. Returns whether it had been notified.
        fn remove(&mut self, number: u64) -> bool {
            let place = self.entries.iter().position(|entry| entry.number == number).expect("it listens");
            self.entries.remove(place).notified
        }
    }

    impl Event {
        pub(crate) fn notify(&self, count: usize) {
            fence(Ordering::SeqCst);
            lock(&self.list).notify(count);
        }

        pub(crate) fn listen(&self) -> EventListener<'_> {
            let mut list = lock(&self.list);
            list.last_number += 1;
            let number = list.last_number;
            list.entries.push(Entry { number, notified: false, thread: None });
            EventListener { event: self, number, listens: true }
        }
    }

    pub(crate) struct EventListener<'a> {
        event: &'a Event,
        number: u64,
        /// Whether it is in the list.
        listens: bool,
    }

    /// As event-listener's, which has several kinds of listeners.
    pub(crate) trait Listener {
        fn wait(self);
        fn wait_deadline(self, deadline: Instant) -> Option<()>;
    }

    impl EventListener<'_> {
        /// Leaves the list if it was notified. Otherwise leaves the thread to unpark.
        fn is_over(&mut self) -> bool {
            let mut list = lock(&self.event.list);
            let entry =
                list.entries.iter_mut().find(|entry| entry.number == self.number).expect("it listens");
            if entry.notified {
                list.remove(self.number);
                self.listens = false;
                return true;
            }
            entry.thread = Some(thread::current());
            false
        }
    }

    impl Listener for EventListener<'_> {
        fn wait(mut self) {
            while !self.is_over() {
                thread::park();
            }
        }

        /// Ends at the deadline, which in a model is when the others have had a step, or at a notification before it.
        fn wait_deadline(mut self, _deadline: Instant) -> Option<()> {
            if self.is_over() {
                return Some(());
            }
            thread::yield_now();
            self.listens = false;
            lock(&self.event.list).remove(self.number).then_some(())
        }
    }

    impl Drop for EventListener<'_> {
        fn drop(&mut self) {
            if self.listens {
                let mut list = lock(&self.event.list);
                if list.remove(self.number) {
                    list.notify(1);
                }
            }
        }
    }
}

pub(crate) mod thread {
    use std::io;
    use std::sync::Arc;
    use std::time::Duration;

    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread::Thread;

    /// There is no time, so it looks again and again.
    pub(crate) fn park_timeout(_timeout: Duration) {
        loom::thread::yield_now();
    }

    /// A builder of threads whose handles know whether the thread is over, which loom's do not.
    pub(crate) struct Builder(loom::thread::Builder);

    pub(crate) struct JoinHandle<T> {
        thread: loom::thread::JoinHandle<T>,
        over: Arc<AtomicBool>,
    }

    impl Builder {
        pub(crate) fn new() -> Self {
            Builder(loom::thread::Builder::new())
        }

        pub(crate) fn name(self, name: String) -> Self {
            Builder(self.0.name(name))
        }

        /// A thread of a model has the stack that loom gives it.
        pub(crate) fn stack_size(self, _bytes: usize) -> Self {
            self
        }

        pub(crate) fn spawn<F, T>(self, body: F) -> io::Result<JoinHandle<T>>
        where
            F: FnOnce() -> T + Send + 'static,
            T: Send + 'static,
        {
            let over = Arc::new(AtomicBool::new(false));
            let ends = Arc::clone(&over);
            let thread = self.0.spawn(move || {
                let returned = body();
                ends.store(true, Ordering::Release);
                returned
            })?;
            Ok(JoinHandle { thread, over })
        }
    }

    impl<T> JoinHandle<T> {
        pub(crate) fn is_finished(&self) -> bool {
            self.over.load(Ordering::Acquire)
        }

        pub(crate) fn thread(&self) -> &Thread {
            self.thread.thread()
        }

        pub(crate) fn join(self) -> std::thread::Result<T> {
            self.thread.join()
        }
    }
}
