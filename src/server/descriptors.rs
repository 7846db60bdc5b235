//! How many connections the process's descriptors allow.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors kept out of the connections' reach: the listener, the poller and its waker, the spare ones
/// held as ballast, the side HTTP endpoint with its 16 connections, what the process collector opens under
/// `/proc`, and a few for the rest of the program.
pub const RESERVED_DESCRIPTORS: u64 = 64;

/// The most connections unless asked for more. The queue has a place for each from the start, about 40 bytes,
/// and descriptor limits of a billion are common in containers.
pub const DEFAULT_CONNECTIONS_CAP: usize = 65_536;

/// Raises the soft limit on open descriptors to the hard one, and returns the limit in force. It is the
/// process's, which is why a library does not raise it unasked.
///
/// # Errors
///
/// What the system said when it refused.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    }
    Ok(descriptor_limit())
}

/// The soft limit on open descriptors.
pub(crate) fn descriptor_limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many connections may be opened beside what is open now and the reserve.
pub(crate) fn connections_allowed() -> usize {
    let allowed = descriptor_limit().saturating_sub(open_now()).saturating_sub(RESERVED_DESCRIPTORS);
    usize::try_from(allowed).unwrap_or(usize::MAX)
}

/// Descriptors open now, those inherited from whoever started the program among them.
fn open_now() -> u64 {
    // Without `/proc`, three for the standard streams; the reserve is larger than what else a program opens.
    std::fs::read_dir("/proc/self/fd").map_or(3, |entries| entries.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_descriptors_are_not_given_to_connections() {
        let limit = usize::try_from(descriptor_limit()).unwrap_or(usize::MAX);
        if limit < usize::MAX {
            assert!(connections_allowed() <= limit - 3 - 64);
        }
        assert!(open_now() >= 3);
    }
}
