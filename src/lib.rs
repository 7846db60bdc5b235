//! A bounded worker pool you can see into.

mod pool;

mod clock;
#[expect(dead_code, reason = "for what is built on the pool")]
mod log_limit;
mod metrics;
#[expect(unused_imports, reason = "for what is built on the pool")]
mod sync;

pub use self::clock::Clock;
pub use self::pool::{
    DEFAULT_STACK_SIZE, Drained, Handler, MAX_QUEUE_CAPACITY, MAX_WORKERS, Pool, PoolBuilder, PoolError,
    Rejected, Stats, Turn, panic_message,
};
