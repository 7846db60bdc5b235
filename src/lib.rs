//! A bounded worker pool you can see into, and a TCP server built on it.
//!
//! - [`Pool`]: named worker threads over a bounded queue, for closures that block. A [`JobHandle`] brings the result
//!   back, to a thread or to async code. The pool reports its queue depth, waits, busy time and oldest job at any
//!   moment. It catches panics, lets jobs wait for jobs of their own pool, and drains without losing a job.
//! - [`Server`]: TCP connections served by a pool. Silent connections and slow readers hold no worker, and everything
//!   is bounded. [`ServerHandle::drain`] ends the server gracefully. A [`Service`] answers the bytes that clients send,
//!   and [`Echo`] is one.
//! - [`Exposition`]: a side HTTP endpoint that publishes any `prometheus` registry, probes, and a page that shows a
//!   server at work.
//!
//! Each can be used without the others. The program `millpond` is [`Echo`] on a [`Server`], with an [`Exposition`]
//! beside it.
//!
//! ```
//! use std::time::Duration;
//! use millpond::Pool;
//!
//! let pool = Pool::builder("lookup").workers(8).queue_capacity(100).build()?;
//! let one = pool.submit(|| "the first".len())?; // blocks while the queue is full
//! let two = pool.try_submit(|| "the second".len())?; // gives the job back instead
//! println!("{} and {}", one.join()?, two.join()?);
//! println!("{}", pool.stats()); // a table
//! assert!(pool.drain(Duration::from_secs(5)).is_clean());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ```
//! use millpond::{Echo, Exposition, Server};
//!
//! let any_port = ([127, 0, 0, 1], 0).into();
//! let registry = prometheus::Registry::new();
//! let server = Server::builder("echo").service(Echo).workers(4).bind(any_port)?.start()?;
//! server.register(&registry)?;
//! let metrics = Exposition::serve(registry, any_port)?;
//! println!("echo on {}, metrics on http://{}/metrics", server.local_addr(), metrics.local_addr());
//!
//! server.handle().drain();
//! println!("{}", server.wait().expect("it drained"));
//! metrics.stop();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Layout
//!
//! In reading order. A module knows nothing of the modules above it.
//!
//! | module | what |
//! | --- | --- |
//! | [`exposition`] | HTTP: the metrics endpoint and the status page, as a service on a server of its own |
//! | [`server`] | TCP: reactor, connections, limits, drain |
//! | `lifecycle` | the phases of a server's life |
//! | [`pool`] | jobs and their handles, queue, workers, their numbers |
//! | `metrics` | counters that threads do not share, and metric families for the registry |
//! | `clock`, `log_limit`, `sync` | time, a bound on log lines, the types that the model checker replaces |

pub mod exposition;
pub mod server;

mod lifecycle;
pub mod pool;

mod clock;
mod log_limit;
mod metrics;
mod sync;

pub use self::exposition::{BoundExposition, Exposition};
pub use self::lifecycle::Phase;
pub use self::pool::{
    AsCompleted, CancelOnDrop, CancelToken, DEFAULT_QUEUE_CAPACITY, DEFAULT_STACK_SIZE, Drained, Durations,
    InitError, JobError, JobHandle, MAX_QUEUE_CAPACITY, MAX_WORKERS, Map, MapError, MapUnordered, Panic,
    Pool, PoolBuilder, PoolError, Rejected, Returned, Stats, Until, WithDeadline, as_completed,
    panic_message, wait,
};
#[cfg(not(millpond_loom))]
pub use self::pool::{ScopedHandle, ScopedPool, block_on};
pub use self::server::{
    DEFAULT_BACKLOG, DEFAULT_CONNECTIONS_CAP, DEFAULT_KEEPALIVE, DEFAULT_SERVICE_STACK_SIZE, Echo, Laboured,
    Next, NotReady, Overload, RESERVED_DESCRIPTORS, Report, Running, Server, ServerBuilder, ServerError,
    ServerHandle, Service, raise_descriptor_limit,
};

/// The metrics library, whose registries the pool, the server and the endpoint take.
pub use prometheus;

/// The README's Rust is compiled and run with the other examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
