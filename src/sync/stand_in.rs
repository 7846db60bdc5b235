//! What stands in, in a model, for what loom cannot take over.
//!
//! A model runs the pool's own code, and all of it: admission, the order of push, look, sleep and wake, the stages, the
//! cascade, lingering, the crew, waiting for room, the worker's loop and the helper's, drain, abort and resize. loom runs its
//! threads one step at a time, in every order that matters, and reports a thread that sleeps for ever as a deadlock.
//! Four things are not the real ones:
//!
//! - **The ring of jobs** ([`ring`]), in place of `crossbeam_channel::bounded`. The real one decides each push, take and look at
//!   one sequentially consistent step on its head or its tail; this one has both counts in one atomic word, and the same
//!   step on that. *Stronger*: a step here is ordered after all before it, while a real push is ordered after pushes, a real
//!   take after takes and after the push of what it takes; and what was pushed is there at once, where a real taker may have
//!   to spin for an instant until it is written. What guards the pool's own memory does not lean on either: the order of
//!   steps is all that the argument in `pool/queue.rs` uses.
//! - **The sleepers** ([`event`]), in place of `event_listener::Event`. As in version 5.4 it is a list under a lock, which
//!   every call takes; `notify(n)` makes the notified as many as `n`, those counted that were notified before and have not
//!   removed themselves; the first to listen is the first to be notified; a notified listener that is dropped notifies
//!   the next. Threads sleep by parking, and look again when they awake. A wait with a deadline is one that may end at any
//!   step, so that a notification and the end of patience meet in every order.
//! - **Sequentially consistent atomics** ([`atomic`]). loom takes `SeqCst` accesses for acquire and release, and would report
//!   lost wake-ups that cannot happen; but it has `SeqCst` fences in full. So a fence stands before each such load, after each such
//!   store and around each such read-modify-write. That forbids what the standard forbids. *Stronger*: the fences
//!   order weaker accesses beside them as well, so an ordering chosen too weak is not always seen. The atomics of a
//!   connection's state use none and are loom's as they are.
//! - **Time.** There is none: a wait with an end looks again and again or ends at any step, drains have no deadline, and a
//!   worker that lingers looks twice instead of eleven times.
//!
//! What only counts or times, for readers of numbers, is not seen by the checker: workers' cells, the ring of push times,
//! rejections. No thread decides by it what to do next, but for the last loop of an abort, which gives way until the numbers
//! are complete.

pub(crate) mod atomic {
    #![expect(dead_code, reason = "each is a whole atomic, and not each is used in every way")]

    use std::sync::atomic::Ordering;

    use loom::sync::atomic::fence;

    /// Wraps one of loom's atomics, with the read-modify-writes it is used for.
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

                /// In a model it does not fail for no reason: whoever calls it tries again at once.
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

pub(crate) mod ring {
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::atomic::AtomicU64;
    use crate::sync::lock;

    /// How many were ever pushed above, how many ever taken below.
    const PUSH: u64 = 1 << 32;
    const TAKE: u64 = 1;

    struct Ring<T> {
        word: AtomicU64,
        /// Changed together with the word: between two of the checker's steps nobody else runs.
        held: std::sync::Mutex<VecDeque<T>>,
        capacity: usize,
    }

    pub(crate) struct Sender<T>(Arc<Ring<T>>);
    pub(crate) struct Receiver<T>(Arc<Ring<T>>);

    /// There is no room; what was to be sent comes back.
    pub(crate) struct Full<T>(T);

    impl<T> Full<T> {
        pub(crate) fn into_inner(self) -> T {
            self.0
        }
    }

    pub(crate) fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
        let ring = Arc::new(Ring { word: AtomicU64::new(0), held: Default::default(), capacity });
        (Sender(Arc::clone(&ring)), Receiver(ring))
    }

    fn waiting(word: u64) -> usize {
        usize::try_from((word / PUSH) - (word % PUSH)).expect("as many as there is room for")
    }

    impl<T> Ring<T> {
        /// Changes the word by `step`, unless `hopeless` says of the number that waits that it cannot be.
        fn step(&self, step: u64, hopeless: impl Fn(usize) -> bool) -> bool {
            let mut word = self.word.load(Ordering::SeqCst);
            loop {
                if hopeless(waiting(word)) {
                    return false;
                }
                match self.word.compare_exchange(word, word + step, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => return true,
                    Err(found) => word = found,
                }
            }
        }
    }

    impl<T> Sender<T> {
        pub(crate) fn try_send(&self, job: T) -> Result<(), Full<T>> {
            let ring = &self.0;
            if !ring.step(PUSH, |waiting| waiting == ring.capacity) {
                return Err(Full(job));
            }
            lock(&ring.held).push_back(job);
            Ok(())
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn try_recv(&self) -> Result<T, ()> {
            let ring = &self.0;
            if !ring.step(TAKE, |waiting| waiting == 0) {
                return Err(());
            }
            Ok(lock(&ring.held).pop_front().expect("it was counted"))
        }

        pub(crate) fn len(&self) -> usize {
            waiting(self.0.word.load(Ordering::SeqCst))
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.len() == 0
        }

        pub(crate) fn is_full(&self) -> bool {
            self.len() == self.0.capacity
        }

        pub(crate) fn capacity(&self) -> Option<usize> {
            Some(self.0.capacity)
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
        /// Whom to unpark, once it waits.
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

        /// Takes a listener out, and says whether it had been notified.
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
        /// Leaves the list if it was notified; otherwise says whom to tell.
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

    macro_rules! listener {
        ($event:expr => $listener:ident) => {
            let $listener = $event.listen();
        };
    }
    pub(crate) use listener;
}

pub(crate) mod thread {
    use std::io;
    use std::sync::Arc;
    use std::time::Duration;

    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread::Thread;

    /// There is no time: it looks again and again.
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
