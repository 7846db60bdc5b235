//! A bounded worker pool you can see into, and a TCP server built on it.
//!
//! - [`Pool`]: named worker threads over a bounded queue. It measures what it does, says its queue depth,
//!   waits, busy time and oldest job at any moment, catches panics, and drains without losing a job.
//! - [`Server`]: TCP connections served by a pool. Silent connections and slow readers hold no worker;
//!   everything is bounded; [`ServerHandle::drain`] ends it gracefully. What it does with bytes is a
//!   [`Service`]: [`Echo`] is one.
//! - [`Exposition`]: a side HTTP endpoint that publishes any `prometheus` registry, and probes.
//!
//! The program `millpond` is [`Echo`] on a [`Server`] with an [`Exposition`] beside it.
//!
//! ```
//! use millpond::{Echo, Exposition, Server};
//!
//! let any_port = ([127, 0, 0, 1], 0).into();
//! let registry = prometheus::Registry::new();
//! let server = Server::builder("echo").workers(4).bind(any_port)?.start(Echo)?;
//! server.register(&registry)?;
//! let metrics = Exposition::bind(registry, any_port)?.start()?;
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
//! In reading order; what stands lower knows nothing of what stands above it.
//!
//! | module | what |
//! | --- | --- |
//! | `exposition` | HTTP: the metrics endpoint, as a service on a server of its own |
//! | `server` | TCP: reactor, connections, limits, drain |
//! | `lifecycle` | the phases of a server's life |
//! | `pool` | queue, workers, their numbers |
//! | `metrics` | counting without sharing; families for the registry |
//! | `clock`, `log_limit`, `sync` | time, a bound on log lines, the model checker's seam |

mod exposition;
mod server;

mod lifecycle;
mod pool;

mod clock;
mod log_limit;
mod metrics;
mod sync;

pub use self::clock::Clock;
pub use self::exposition::{BoundExposition, Exposition};
pub use self::lifecycle::Phase;
pub use self::pool::{
    DEFAULT_STACK_SIZE, Drained, Handler, MAX_QUEUE_CAPACITY, MAX_WORKERS, Pool, PoolBuilder, PoolError,
    Rejected, Stats, Turn, panic_message,
};
pub use self::server::{
    DEFAULT_BACKLOG, DEFAULT_CONNECTIONS_CAP, Echo, Laboured, Next, NotReady, Overload, RESERVED_DESCRIPTORS,
    Report, Running, Server, ServerBuilder, ServerError, ServerHandle, Service, raise_descriptor_limit,
};

/// The README's Rust is compiled and run with the other examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
