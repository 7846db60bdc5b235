//! What a job leaves behind when it has ended: nothing that its owner has not asked for.

use std::any::Any;
use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use millpond::prometheus::{Registry, TextEncoder};
use millpond::{JobError, JobHandle, Panic, Pool, Until, wait};

use crate::common::pools::{held, pool_of};
use crate::common::{PATIENCE, eventually};
use crate::{Wakes, alone, join, resident_kib, submit};

/// The payload of a panic. The tests count the copies of its `Arc`.
#[expect(dead_code, reason = "what matters is that the payload is large, and when it is dropped")]
struct Payload(Arc<()>, [u8; 10_000]);

impl Payload {
    fn new(witness: &Arc<()>) -> Box<Self> {
        Box::new(Payload(Arc::clone(witness), [7; 10_000]))
    }
}

#[test]
fn five_thousand_callbacks_that_panic_leave_no_payload() {
    let (pool, witness) = (pool_of(2, 64), Arc::new(()));
    for _ in 0..5_000 {
        let payload = Payload::new(&witness);
        pool.submit(|| ()).expect("room").on_done(move |_| resume_unwind(payload));
    }
    assert!(pool.wait_idle(PATIENCE));
    eventually("no payload is left", || (Arc::strong_count(&witness) == 1).then_some(()));
    assert_eq!((pool.stats().completed, pool.stats().panicked), (5_000, 0));
}

#[test]
fn five_thousand_callbacks_that_panic_take_no_memory() {
    alone("leaks::five_thousand_callbacks_that_panic_take_no_memory", || {
        let pool = pool_of(2, 64);
        let panicking = |jobs: usize| {
            for _ in 0..jobs {
                let payload = vec![7_u8; 10_000];
                pool.submit(|| ()).expect("room").on_done(move |_| resume_unwind(Box::new(payload)));
            }
            assert!(pool.wait_idle(PATIENCE));
        };
        panicking(500);
        let before = resident_kib();
        panicking(5_000);
        let grown = resident_kib().saturating_sub(before);
        assert!(grown < 8 * 1024, "{grown} KiB for 5,000 payloads");
    });
}

#[test]
fn the_payload_of_a_job_that_panics_is_dropped_with_what_can_ask_for_it() {
    let (pool, witness) = (pool_of(1, 64), Arc::new(()));
    // No handle can ask for these two.
    let payload = Payload::new(&witness);
    pool.execute(move || resume_unwind(payload)).expect("room");
    let payload = Payload::new(&witness);
    drop(submit(&pool, move || resume_unwind(payload)));
    eventually("both have panicked", || (pool.stats().panicked == 2).then_some(()));
    assert!(pool.wait_idle(PATIENCE));
    eventually("both payloads are dropped", || (Arc::strong_count(&witness) == 1).then_some(()));
    // This error keeps its payload as long as it lives.
    let payload = Payload::new(&witness);
    let error = join(submit(&pool, move || -> () { resume_unwind(payload) })).expect_err("it panicked");
    assert_eq!(Arc::strong_count(&witness), 2);
    drop(error);
    assert_eq!(Arc::strong_count(&witness), 1);
}

#[test]
fn five_thousand_finished_jobs_keep_none_of_their_captures() {
    alone("leaks::five_thousand_finished_jobs_keep_none_of_their_captures", || {
        let pool = pool_of(2, 16);
        let run = |jobs: usize| -> Vec<JobHandle<u8>> {
            let jobs = (0..jobs).map(|number| {
                let captured = [number.to_le_bytes()[0]; 16 * 1024];
                pool.submit(move || std::hint::black_box(captured)[0]).expect("room")
            });
            let handles: Vec<_> = jobs.collect();
            eventually("all end", || handles.iter().all(JobHandle::is_finished).then_some(()));
            handles
        };
        let few = run(200);
        let before = resident_kib();
        let many = run(5_000);
        let grown = resident_kib().saturating_sub(before);
        assert!(grown < 10 * 1024, "{grown} KiB for the handles of 5,000 jobs with captures of 16 KiB");
        for (number, job) in few.into_iter().enumerate().chain(many.into_iter().enumerate()) {
            assert_eq!(join(job), Ok(number.to_le_bytes()[0]));
        }
    });
}

#[test]
fn the_captures_of_a_job_are_dropped_before_its_joiner_is_told() {
    let (pool, witness) = (pool_of(1, 16), Arc::new(()));
    for _ in 0..1_000 {
        let captured = Arc::clone(&witness);
        // The closure owns the capture, and drops it when it has returned.
        let job = submit(&pool, move || Arc::strong_count(&captured));
        assert_eq!(join(job), Ok(2));
        assert_eq!(Arc::strong_count(&witness), 1, "the captures are still there");
    }
}

#[test]
fn a_dropped_handle_drops_its_waker() {
    let (pool, latch) = held(1, 16);
    let mut job = submit(&pool, || 1);
    let wakes = Arc::new(Wakes::default());
    assert!(Pin::new(&mut job).poll(&mut Context::from_waker(&wakes.waker())).is_pending());
    assert_eq!(Arc::strong_count(&wakes), 2, "the job keeps the waker of its handle");
    drop(job);
    assert_eq!(Arc::strong_count(&wakes), 1, "the waker is still there");
    latch.open();
    eventually("both are counted", || (pool.stats().completed == 2).then_some(()));
    assert_eq!(wakes.count(), 0);
}

#[test]
fn a_handle_keeps_only_the_waker_of_its_last_poll() {
    let (pool, latch) = held(1, 16);
    let mut job = submit(&pool, || 1);
    let (first, second) = (Arc::new(Wakes::default()), Arc::new(Wakes::default()));
    for wakes in [&first, &second] {
        assert!(Pin::new(&mut job).poll(&mut Context::from_waker(&wakes.waker())).is_pending());
    }
    assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (1, 2));
    latch.open();
    eventually("the task is woken", || (second.count() == 1).then_some(()));
    assert_eq!(first.count(), 0);
    let polled = Pin::new(&mut job).poll(&mut Context::from_waker(&first.waker()));
    assert_eq!(polled, Poll::Ready(Ok(1)));
    drop(job);
    assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (1, 1));
}

#[test]
fn a_dropped_submit_async_drops_its_waker_and_its_job() {
    let (pool, latch) = held(1, 1);
    let queued = submit(&pool, || 1);
    let (wakes, captured) = (Arc::new(Wakes::default()), Arc::new(()));
    let inside = Arc::clone(&captured);
    let mut submission = Box::pin(pool.submit_async(move || drop(inside)));
    assert!(submission.as_mut().poll(&mut Context::from_waker(&wakes.waker())).is_pending());
    drop(submission);
    assert_eq!((Arc::strong_count(&wakes), Arc::strong_count(&captured)), (1, 1));
    latch.open();
    assert_eq!(join(queued), Ok(1));
}

// Metrics.

fn text_of(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).expect("text")
}

/// The user takes the first pool's metrics out by hand, so that a namesake can take its place.
#[test]
fn dropping_a_pool_leaves_the_metrics_of_a_namesake() {
    let registry = Registry::new();
    let start = |workers: usize| Pool::builder("twin").workers(workers).registry(&registry).build();
    let first = start(1).expect("the name is free");
    registry.unregister(first.collector()).expect("the pool's metrics are there");
    assert!(!text_of(&registry).contains("pool=\"twin\""));
    let second = start(3).expect("the name is free again");
    drop(first);
    let text = text_of(&registry);
    assert!(
        text.contains("millpond_pool_workers{pool=\"twin\"} 3"),
        "the namesake's metrics are gone:\n{text}"
    );
    drop(second);
    assert!(!text_of(&registry).contains("pool=\"twin\""), "a pool takes its own metrics out");
    start(2).expect("the name is free at last");
}

// What a panic leaves on purpose.

fn error_of(pool: &Pool, payload: impl Any + Send) -> JobError {
    join(submit(pool, move || -> () { resume_unwind(Box::new(payload)) })).expect_err("it panicked")
}

#[test]
fn into_panic_gives_the_payload_once() {
    let pool = pool_of(1, 16);
    let error = error_of(&pool, 7_u64);
    let copy = error.clone();
    let payload = error.into_panic().expect("the payload");
    assert_eq!(payload.downcast_ref::<u64>(), Some(&7));
    assert!(copy.clone().into_panic().is_none(), "the payload was taken through the other copy");
    assert!(copy.to_string().starts_with("the job panicked"), "{copy}");
    // What one thread caught can go on in another.
    let error = error_of(&pool, "out of cheese");
    let payload = std::panic::catch_unwind(|| resume_unwind(error.into_panic().expect("the payload")));
    assert_eq!(millpond::panic_message(&*payload.expect_err("it unwinds")), "out of cheese");
    assert!(JobError::Cancelled.into_panic().is_none());
    assert!(JobError::Expired.into_panic().is_none());
}

#[test]
fn a_panic_has_its_message_also_when_its_payload_was_taken() {
    let pool = pool_of(1, 16);
    let message = |error: &JobError| match error {
        JobError::Panicked(panic) => Panic::message(panic).to_owned(),
        other => panic!("it panicked, and this says {other:?}"),
    };
    for (error, expected) in [
        (error_of(&pool, "a literal"), "a literal"),
        (error_of(&pool, format!("number {}", 7)), "number 7"),
        (error_of(&pool, 7_u64), "of a type that is no text"),
    ] {
        let copy = error.clone();
        assert_eq!(error, copy);
        assert_eq!(
            (message(&error).as_str(), error.to_string()),
            (expected, format!("the job panicked: {expected}"))
        );
        assert!(error.into_panic().is_some());
        assert_eq!(message(&copy), expected);
    }
    assert_ne!(error_of(&pool, "one"), error_of(&pool, "another"));
}

#[test]
fn errors_of_jobs_can_be_sent_and_shared() {
    fn sendable<T: Send + Sync + Clone + 'static>(value: T) -> T {
        value
    }
    let pool = pool_of(1, 16);
    // This payload can be sent, and cannot be shared.
    let error = sendable(error_of(&pool, std::cell::Cell::new(5)));
    let here = error.clone();
    let there = std::thread::spawn(move || error.into_panic().is_some());
    assert!(there.join().expect("it returns"));
    assert!(here.into_panic().is_none());
}

/// Each wait gives up. If it left a record of itself behind, the job that still waits would keep all of them.
#[test]
fn waits_that_gave_up_leave_nothing_in_their_job() {
    alone("leaks::waits_that_gave_up_leave_nothing_in_their_job", || {
        let (pool, latch) = held(1, 16);
        let mut jobs = [submit(&pool, || 1)];
        let mut give_up = |waits: usize| {
            for _ in 0..waits {
                assert!(!wait(&mut jobs, Until::AllCompleted, Duration::ZERO));
            }
        };
        give_up(1_000);
        let before = resident_kib();
        give_up(100_000);
        let grown = resident_kib().saturating_sub(before);
        assert!(grown < 4 * 1024, "{grown} KiB for 100,000 waits");
        latch.open();
        assert_eq!(jobs.map(join), [Ok(1)]);
    });
}
