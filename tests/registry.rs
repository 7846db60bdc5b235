//! The metrics of pools, servers and endpoints in a registry: all of them or none, and none when their owner is gone.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::pools::{broken_law, held};
use common::{PATIENCE, eventually, thread_states};
use millpond::prometheus::{Gauge, Opts, Registry, TextEncoder};
use millpond::{Echo, Exposition, Laboured, Pool, PoolError, Running, Server, ServerError, Service};

fn text_of(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).expect("text")
}

/// The value of one series, written as in the text.
fn value(registry: &Registry, series: &str) -> Option<f64> {
    let text = text_of(registry);
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.map(|value| value.parse().expect("a number"))
}

/// A server that is drained when the test ends, also if the test fails.
struct Served(Option<Running>);

impl Served {
    fn start(service: impl Service) -> Self {
        let any_port = ([127, 0, 0, 1], 0).into();
        let server = Server::builder("echo").service(service).workers(3).max_connections(10).bind(any_port);
        Served(Some(server.expect("a port").start().expect("threads")))
    }

    fn running(&self) -> &Running {
        self.0.as_ref().expect("it is not drained yet")
    }

    fn drain(&mut self) {
        if let Some(running) = self.0.take() {
            running.handle().drain();
            running.finished().recv_timeout(PATIENCE).expect("the drain ends");
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.drain();
    }
}

/// The pool has metrics that the server's pool has too, and that come last in the server's registration.
#[test]
fn a_registry_that_has_one_of_a_servers_families_takes_none_of_the_others() {
    let registry = Registry::new();
    let pool = Pool::builder("echo").workers(1).registry(&registry).build().expect("a thread");
    let before = text_of(&registry);
    let server = Served::start(Echo);
    server.running().register(&registry).expect_err("the registry has the pool's metrics under that name");
    let families = |text: &str| text.lines().filter(|line| line.starts_with("# TYPE")).count();
    assert_eq!(families(&text_of(&registry)), families(&before), "{}", text_of(&registry));
    server.running().handle().unregister(&registry).expect_err("the server's metrics are not in it");
    drop(pool);
    assert_eq!(text_of(&registry), "");
    server.running().register(&registry).expect("the names are free");
    server.running().register(&registry).expect_err("they are taken now");
    assert_eq!(value(&registry, "millpond_pool_workers{pool=\"echo\"}"), Some(3.0));
}

#[test]
fn a_registry_that_has_one_of_a_pools_families_takes_none_of_the_others() {
    let registry = Registry::new();
    let help = "Most jobs that may wait. When pool_queue_depth reaches it, submissions are rejected.";
    let taken = Opts::new("millpond_pool_queue_capacity", help).const_label("pool", "jobs");
    let taken = Gauge::with_opts(taken).expect("valid");
    registry.register(Box::new(taken.clone())).expect("the registry is new");
    let before = text_of(&registry);
    let refused = Pool::builder("jobs").workers(2).registry(&registry).build().expect_err("one is taken");
    assert!(matches!(refused, PoolError::Register { .. }), "{refused:?}");
    assert_eq!(text_of(&registry), before);
    registry.unregister(Box::new(taken)).expect("it is there");
    let pool = Pool::builder("jobs").workers(2).registry(&registry).build().expect("the name is free");
    assert_eq!(value(&registry, "millpond_pool_workers{pool=\"jobs\"}"), Some(2.0));
    drop(pool);
    assert_eq!(text_of(&registry), "");
}

#[test]
fn a_registry_takes_the_next_server_when_the_drained_one_is_taken_out() {
    let registry = Registry::new();
    for round in 1..=3 {
        let mut server = Served::start(Echo);
        server.running().register(&registry).expect("the one before was taken out");
        let handle = server.running().handle();
        assert_eq!(value(&registry, "millpond_phase{phase=\"serving\"}"), Some(1.0), "round {round}");
        server.drain();
        assert_eq!(value(&registry, "millpond_phase{phase=\"stopped\"}"), Some(1.0), "round {round}");
        handle.unregister(&registry).expect("it is there");
        assert_eq!(text_of(&registry), "");
        handle.unregister(&registry).expect_err("it is taken out already");
    }
}

#[test]
fn a_registry_takes_the_next_endpoint_when_the_first_has_stopped_and_no_second_one_before() {
    let registry = Registry::new();
    let any_port = ([127, 0, 0, 1], 0).into();
    let first = Exposition::serve(registry.clone(), any_port).expect("it starts");
    // In the registry of the second, one of its families is taken.
    let other = Registry::new();
    let pool = Pool::builder("http").workers(1).registry(&other).build().expect("a thread");
    for (registry, families) in [(&registry, text_of(&registry)), (&other, text_of(&other))] {
        let names = |text: &str| {
            text.lines().filter(|line| line.starts_with("# TYPE")).map(str::to_owned).collect::<Vec<_>>()
        };
        let second = Exposition::serve(registry.clone(), any_port);
        assert!(matches!(second, Err(ServerError::Registry(_))), "a registry has one endpoint: {second:?}");
        assert_eq!(names(&text_of(registry)), names(&families));
    }
    drop(pool);
    first.stop();
    eventually("the threads of the endpoints have ended", || {
        let left = thread_states("mill-http");
        left.is_empty().then_some(())
    });
    assert_eq!(text_of(&registry), "");
    for registry in [registry, other] {
        Exposition::serve(registry, any_port).expect("the names are free").stop();
    }
}

#[test]
fn a_pool_has_no_workers_when_its_drain_is_over() {
    let registry = Registry::new();
    let pool = Pool::builder("jobs").workers(4).registry(&registry).build().expect("threads");
    assert_eq!(
        (pool.stats().workers, value(&registry, "millpond_pool_workers{pool=\"jobs\"}")),
        (4, Some(4.0))
    );
    for _ in 0..100 {
        pool.execute(|| {}).expect("it is open");
    }
    let drained = pool.drain(PATIENCE);
    assert!(drained.is_clean(), "{drained:?}");
    assert_eq!((drained.stats.workers, pool.stats().workers), (0, 0));
    assert_eq!(value(&registry, "millpond_pool_workers{pool=\"jobs\"}"), Some(0.0));
}

#[test]
fn a_worker_counts_until_its_job_has_ended_after_an_abort() {
    let (pool, latch) = held(3, 10);
    pool.resize(5).expect("threads");
    pool.abort();
    eventually("the idle workers have ended", || (pool.stats().workers == 3).then_some(()));
    assert_eq!(pool.stats().busy, 3);
    latch.open();
    eventually("all have ended", || (pool.stats().workers == 0).then_some(()));
    assert_eq!(pool.stats().busy, 0);
}

/// Many pools. A thread reads each pool's numbers all the while the pool drains or aborts.
#[test]
fn the_laws_hold_at_every_moment_while_workers_leave() {
    for round in 0..100 {
        let pool = Pool::builder("leaving").workers(8).queue_capacity(50).build().expect("threads");
        for _ in 0..50 {
            // Each job lasts some microseconds, so that workers leave at different times.
            let _ = pool.try_execute(|| thread::sleep(Duration::from_micros(50)));
        }
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut last = pool.stats();
                while !over.load(Ordering::Acquire) {
                    let stats = pool.stats();
                    if broken_law(&stats).is_some() || stats.workers > 8 || stats.aborted < last.aborted {
                        return Some(format!("{last:?}, then {stats:?}"));
                    }
                    last = stats;
                }
                None
            });
            if round % 2 == 0 {
                pool.abort();
            }
            pool.drain(PATIENCE);
            over.store(true, Ordering::Release);
            assert_eq!(reader.join().expect("the reader"), None, "round {round}");
        });
        assert_eq!(pool.stats().workers, 0);
    }
}

/// The reactor counts as one of the workers if the service never blocks. In both servers there are three.
#[test]
fn a_server_has_no_workers_when_its_drain_is_over() {
    fn check(service: impl Service) {
        let registry = Registry::new();
        let mut server = Served::start(service);
        server.running().register(&registry).expect("the registry is new");
        let handle = server.running().handle();
        let any_port = ([127, 0, 0, 1], 0).into();
        let page = Exposition::bind(Registry::new(), any_port).expect("a port").status(handle);
        let page = page.start().expect("threads");
        let status = || -> serde_json::Value {
            let answer = common::http(page.local_addr(), "GET /status.json HTTP/1.1\r\n\r\n");
            serde_json::from_str(&answer.body).expect("JSON")
        };
        let seen = || {
            let status = status();
            let rows = status["workers"].as_array().expect("rows").len();
            let workers = value(&registry, "millpond_pool_workers{pool=\"echo\"}");
            (workers, status["pool"]["workers"].as_u64(), rows, status["limits"]["workers"].as_u64())
        };
        assert_eq!(seen(), (Some(3.0), Some(3), 3, Some(3)));
        server.drain();
        assert_eq!(seen(), (Some(0.0), Some(0), 0, Some(3)));
        page.stop();
    }
    check(Echo);
    check(Laboured::new(Echo, Duration::from_micros(1)));
}
