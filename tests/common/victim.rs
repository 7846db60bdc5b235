//! A server that suffers a fault or an attack, and the checks that it is as before afterwards.

use std::time::{Duration, Instant};

use super::scrape::Scrape;
use super::{Millpond, eventually, ping};

/// The longest time that an unharmed server needs for a scrape, on a machine that is busy with other tests.
pub const PROMPT: Duration = Duration::from_secs(1);

/// The most memory that a server may have gained afterwards, in MiB. The allocator keeps memory for reuse, such as that
/// of the read buffers. No test here leaves more than one MiB.
const KEPT_MIB: u64 = 4;

/// A server, and its state before the fault.
pub struct Victim {
    pub server: Millpond,
    pub threads: u64,
    pub files: usize,
    resident_mib: u64,
}

impl Victim {
    pub fn start(flags: &[&str]) -> Self {
        Self::of(Millpond::start(flags))
    }

    /// Records the server's threads, descriptors and memory.
    pub fn of(server: Millpond) -> Self {
        server.scrape();
        let (threads, files) = settled(&server);
        let resident_mib = server.resident_mib();
        Victim { server, threads, files, resident_mib }
    }

    /// Asserts that the server answers a scrape in time during the fault. Returns the time that the scrape took.
    pub fn scrape_in_time(&self) -> Duration {
        let start = Instant::now();
        assert_eq!(self.server.get("/metrics").code, 200);
        let took = start.elapsed();
        assert!(took < PROMPT, "a scrape took {took:?}");
        took
    }

    /// Asserts that after the fault every connection is gone and counted, and no thread, descriptor or memory is left
    /// over. Others are served, and the drain is clean. Returns the last scrape before the drain.
    pub fn unharmed(mut self) -> Scrape {
        let is_over = |scrape: &Scrape| scrape.sum("connections", "state=") == 0.0;
        let scrape = self.server.scrape_after("every connection is gone", is_over);
        // The server has answered all earlier requests now.
        self.scrape_in_time();
        // Fewer are fine: a scrape's connection may have been open still when they were counted at the start.
        eventually("no thread or descriptor is left over", || {
            (self.server.threads() <= self.threads && self.server.open_files() <= self.files).then_some(())
        });
        let kept = self.server.resident_mib().saturating_sub(self.resident_mib);
        assert!(kept <= KEPT_MIB, "{kept} MiB more than before");
        ping(&mut self.server.connect(), b"the echo is unharmed");
        assert_eq!(self.server.drain(), Some(0));
        assert!(!self.server.log().contains("panic"), "{}", self.server.log());
        scrape
    }
}

/// Threads and descriptors once the last scrape's connection is closed.
fn settled(server: &Millpond) -> (u64, usize) {
    let mut last = (server.threads(), server.open_files());
    eventually("quiet", || {
        std::thread::sleep(Duration::from_millis(50));
        let now = (server.threads(), server.open_files());
        (std::mem::replace(&mut last, now) == now).then_some(now)
    })
}
