//! A bounded worker pool you can see into, and a TCP server built on it.

mod server;

mod lifecycle;
mod pool;

mod clock;
mod log_limit;
mod metrics;
mod sync;

pub use self::clock::Clock;
pub use self::lifecycle::Phase;
pub use self::pool::{
    DEFAULT_STACK_SIZE, Drained, Handler, MAX_QUEUE_CAPACITY, MAX_WORKERS, Pool, PoolBuilder, PoolError,
    Rejected, Stats, Turn, panic_message,
};
pub use self::server::{
    DEFAULT_BACKLOG, DEFAULT_CONNECTIONS_CAP, Echo, Laboured, Next, NotReady, Overload, RESERVED_DESCRIPTORS,
    Report, Running, Server, ServerBuilder, ServerError, ServerHandle, Service, raise_descriptor_limit,
};
