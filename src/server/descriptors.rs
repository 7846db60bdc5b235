//! How many connections the process's descriptors allow.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that connections may not use. The server needs them for the listener, the poller and its waker, and the
/// spare descriptors that it keeps open. The side HTTP endpoint needs them for itself and its 16 connections. The
/// process collector opens files under `/proc`, and a few are for the rest of the program.
pub const RESERVED_DESCRIPTORS: u64 = 64;

/// The default limit on connections is at most this. The queue has a place of about 40 bytes for each from the start,
/// and descriptor limits of a billion are common in containers.
pub const DEFAULT_CONNECTIONS_CAP: usize = 65_536;

/// Raises the soft limit on open descriptors to the hard one, and returns the limit in force. The limit is that of the
/// whole process, so the library does not raise it unless the program calls this.
///
/// # Errors
///
/// The system's error, if it refuses.
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

/// How many connections may be opened beside the descriptors that are open now and the reserve.
pub(crate) fn connections_allowed() -> usize {
    let allowed = descriptor_limit().saturating_sub(open_now()).saturating_sub(RESERVED_DESCRIPTORS);
    usize::try_from(allowed).unwrap_or(usize::MAX)
}

/// Descriptors that are open now, including those inherited from the parent process.
fn open_now() -> u64 {
    // Without `/proc` the count is three, for the standard streams. The reserve is larger than the number of other
    // descriptors that a program opens.
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
