//! Read buffers, shared by a server's workers.
//!
//! A worker takes a buffer when it starts to work and gives it back before it sleeps, so there are as many as
//! workers awake, not as many as workers: two thousand sleepers sit on none. The last one given back is the
//! first taken, so a few workers at a time use few buffers, whose pages are in the cache. The lock is taken
//! once in a worker's waking, not once a message.

use std::sync::Mutex;

use crate::sync::lock;

/// Bytes a worker reads at a time. At 64 KiB the system calls' own cost is small beside the copying.
pub(crate) const READ_SIZE: usize = 64 * 1024;

/// Buffers kept when nobody uses them: 4 MiB in all.
const KEPT: usize = 64;

/// The buffers nobody uses.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// An empty buffer with room for a read.
    pub(crate) fn take(&self) -> Vec<u8> {
        let kept = lock(&self.0).pop();
        kept.unwrap_or_else(|| Vec::with_capacity(READ_SIZE))
    }

    /// Takes a buffer back. One that a service made much larger or smaller is not kept.
    pub(crate) fn give_back(&self, mut buffer: Vec<u8>) {
        if !fits(&buffer) {
            return;
        }
        buffer.clear();
        let mut kept = lock(&self.0);
        if kept.len() < KEPT {
            kept.push(buffer);
        }
    }
}

/// Whether a buffer has room for a read, and not for much more.
pub(crate) fn fits(buffer: &Vec<u8>) -> bool {
    (READ_SIZE..=2 * READ_SIZE).contains(&buffer.capacity())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_empty_and_only_if_it_fits() {
        let buffers = Buffers::default();
        let mut buffer = buffers.take();
        assert!(buffer.capacity() >= READ_SIZE);
        buffer.extend([1; 100]);
        buffers.give_back(buffer);
        buffers.give_back(Vec::with_capacity(10));
        buffers.give_back(Vec::with_capacity(READ_SIZE - 1));
        buffers.give_back(Vec::with_capacity(2 * READ_SIZE + 1));
        assert_eq!(lock(&buffers.0).len(), 1);
        // As large as a service makes one that answers a byte more than it was given.
        buffers.give_back(Vec::with_capacity(2 * READ_SIZE));
        assert_eq!(lock(&buffers.0).len(), 2);
        assert!(buffers.take().is_empty());
    }

    #[test]
    fn a_burst_leaves_a_bounded_number_behind() {
        let buffers = Buffers::default();
        let burst: Vec<_> = (0..KEPT + 10).map(|_| buffers.take()).collect();
        burst.into_iter().for_each(|buffer| buffers.give_back(buffer));
        assert_eq!(lock(&buffers.0).len(), KEPT);
    }
}
