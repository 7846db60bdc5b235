//! The bounds and defaults of a pool.

/// The most workers a pool may have. Each is a thread, and a scrape looks at all of them.
pub const MAX_WORKERS: usize = 10_000;

/// The most jobs that may wait in a queue.
pub const MAX_QUEUE_CAPACITY: usize = 100_000_000;

/// The default size of a worker's stack, in bytes. It is the size that std gives a thread, because the pool does not
/// know what its closures need. Only the touched part of a stack takes memory.
pub const DEFAULT_STACK_SIZE: usize = 2 * 1024 * 1024;

/// The default capacity of a pool's queue, in jobs. It is enough for a burst, and small enough that a submitter feels
/// backpressure when the workers fall behind.
pub const DEFAULT_QUEUE_CAPACITY: usize = 1024;
