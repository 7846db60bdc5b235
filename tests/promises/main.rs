//! The pool's promises. Each module has one group of them, and each test is named like its promise.

#[path = "../common/mod.rs"]
mod common;

mod borders;
mod capacity;
mod dead_jobs;
mod extras;
mod leaks;
mod lifetime;
mod nesting;

use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

use common::pools::broken_law;
use common::{PATIENCE, eventually};
use millpond::{JobError, JobHandle, Pool};

fn named(name: &str, workers: usize, queue_capacity: usize) -> Pool {
    let builder = Pool::builder(name).workers(workers).queue_capacity(queue_capacity);
    builder.build().expect("the threads")
}

/// Submits a job that must find room at once.
fn submit<T: Send + 'static>(pool: &Pool, job: impl FnOnce() -> T + Send + 'static) -> JobHandle<T> {
    pool.try_submit(job).expect("there is room")
}

/// Joins a job. If the job does not end, the test fails and does not hang.
fn join<T: Send + 'static>(job: JobHandle<T>) -> Result<T, JobError> {
    job.join_timeout(PATIENCE).expect("the job ends in time")
}

/// Runs a step on a thread of its own. If the step does not return, the test fails and does not hang.
fn in_time<T: Send + 'static>(what: &str, step: impl FnOnce() -> T + Send + 'static) -> T {
    let (report, reports) = mpsc::channel();
    let runner = thread::spawn(move || report.send(step()).expect("the test waits"));
    match reports.recv_timeout(PATIENCE) {
        Ok(result) => {
            runner.join().expect("the step has returned");
            result
        }
        Err(RecvTimeoutError::Timeout) => panic!("not within {PATIENCE:?}: {what}"),
        Err(RecvTimeoutError::Disconnected) => resume_unwind(runner.join().expect_err("the step panicked")),
    }
}

/// Runs a step in time, while another thread reads the pool's numbers. Each reading must keep the laws of the README.
fn scraped<T: Send + 'static>(pool: &Arc<Pool>, what: &str, step: impl FnOnce() -> T + Send + 'static) -> T {
    /// Ends the readings, also if the step panics.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let over = Over(&over);
        let stop = over.0;
        let reader = scope.spawn(move || {
            let mut last = pool.stats();
            loop {
                let is_last = stop.load(Ordering::Acquire);
                let stats = pool.stats();
                assert_eq!(broken_law(&stats), None);
                let in_jobs = stats.job_duration.sum();
                assert!(in_jobs <= stats.busy_time, "{in_jobs:?} in jobs: {stats:?}");
                let fell = stats.submitted < last.submitted
                    || stats.completed < last.completed
                    || stats.cancelled < last.cancelled
                    || stats.expired < last.expired
                    || stats.busy_time < last.busy_time;
                assert!(!fell, "{last:?}, then {stats:?}");
                if is_last {
                    return;
                }
                last = stats;
                thread::yield_now();
            }
        });
        let result = in_time(what, step);
        drop(over);
        reader.join().expect("each reading keeps the laws");
        result
    })
}

/// Runs a test in a process of its own, in which no other test takes memory. `test` is the test's whole name.
fn alone(test: &str, body: impl FnOnce()) {
    const ALONE: &str = "MILLPOND_TEST_ALONE";
    if std::env::var_os(ALONE).is_some_and(|running| running == test) {
        return body();
    }
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(ALONE, test);
    let output = command.output().expect("this program runs again");
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let passed = output.status.success() && said.contains("1 passed");
    assert!(passed, "{}\n{said}\n{complained}", output.status);
}

/// This process's resident memory in KiB.
fn resident_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("this process");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("the field");
    line.split_whitespace().next().expect("a value").parse().expect("a number")
}

/// Counts how often it is woken.
#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wakes {
    fn count(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }

    fn waker(self: &Arc<Self>) -> Waker {
        Waker::from(Arc::clone(self))
    }

    /// Polls a future that is pending each time it has woken its task, until it is ready.
    fn finish<F: Future>(self: &Arc<Self>, what: &str, mut future: Pin<&mut F>) -> F::Output {
        let waker = self.waker();
        let mut polled = 0;
        eventually(what, || {
            let woken = self.count();
            if woken == polled {
                return None;
            }
            polled = woken;
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(output) => Some(output),
                Poll::Pending => None,
            }
        })
    }
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// Numbers that jobs have put here, in their order.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<usize>>>);

impl Log {
    fn push(&self, number: usize) {
        self.0.lock().expect("the log").push(number);
    }

    fn read(&self) -> Vec<usize> {
        self.0.lock().expect("the log").clone()
    }

    fn sorted(&self) -> Vec<usize> {
        let mut numbers = self.read();
        numbers.sort_unstable();
        numbers
    }
}

/// Waits until no thread has a name that begins so. The kernel shows a thread for an instant after a join.
fn no_thread_is_left(name: &str) {
    eventually("no thread is left", || common::thread_states(name).is_empty().then_some(()));
}
