//! The door: which newcomers are let in, and what happens when one cannot be.
//!
//! Guarantees:
//! - No more than `max_connections` are open. At the limit, or while the oldest job in the queue is older
//!   than allowed, newcomers wait in the kernel's backlog, are refused, or take the place of an idle one, as
//!   the policy says.
//! - No `accept` error ends accepting. Each is counted; all but a vanished client pause the door, for 10 ms
//!   at first and up to a second while it goes on, so that a full descriptor table costs no processor time.
//!   Nor does a system that says of every client that it vanished: many in a row pause the door, too.
//! - Other parts of the process find descriptors even when the door has run into the limit: a [`Ballast`] of
//!   spare ones is dropped at the first failure, and the door stays shut until it could take all of them
//!   back.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use mio::net::{TcpListener, TcpStream};
use socket2::{SockFilter, SockRef};
use tracing::warn;

use super::metrics::{AcceptFailure, Ledger};
use crate::clock::ns;
use crate::log_limit::LogLimit;

/// The first and the longest pause after a failed `accept`.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Clients vanished in a row, for which the door pauses: as many as come at a time. A security policy that refuses
/// every `accept` looks like this, and leaves the listener ready for ever.
const VANISHED_IN_A_ROW: u32 = 64;

/// What a server does with newcomers it has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overload {
    /// Stops accepting: newcomers wait in the kernel's backlog until there is room, or give up.
    Wait,
    /// Accepts and closes them at once, counted by reason: they can go elsewhere.
    Reject,
    /// Closes another connection to make room. First go connections whose clients have everything. Then goes the
    /// connection without progress for longest: a silent client, half a request, or a client that does not read. While
    /// workers or the queue hold all connections, new ones wait. It looks at every connection to choose one, so it is
    /// for endpoints with few connections whose clients speak first.
    Evict,
}

impl Overload {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Overload::Wait => "wait",
            Overload::Reject => "reject",
            Overload::Evict => "evict",
        }
    }
}

/// Who holds the listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// This server alone: its backlog ends with it.
    Alone,
    /// Others too, who will accept from its backlog what this server does not.
    Shared,
}

/// The listener with its pauses.
#[derive(Debug)]
pub(crate) struct Door {
    /// `None` once the drain has emptied the backlog, or left it to others.
    listener: Option<TcpListener>,
    holder: Holder,
    /// The listener was reported ready and has not been found empty since.
    pub(crate) ready: bool,
    /// Not before this time; 0 when not paused.
    paused_until_ns: u64,
    pause: Duration,
    /// Clients that vanished since the last that did not.
    vanished: u32,
    ballast: Ballast,
    log: LogLimit,
}

/// What came of one `accept`.
#[derive(Debug)]
pub(crate) enum Knock {
    Newcomer(TcpStream, std::net::SocketAddr),
    /// Nobody waits.
    Nobody,
    /// A newcomer vanished; the next may be sound.
    Vanished,
    /// The door is paused now.
    Paused,
}

impl Door {
    pub(crate) fn new(listener: TcpListener, holder: Holder, ballast: Ballast) -> Self {
        Door {
            listener: Some(listener),
            holder,
            // Connections may have come before the listener was registered.
            ready: true,
            paused_until_ns: 0,
            pause: PAUSE,
            vanished: 0,
            ballast,
            log: LogLimit::default(),
        }
    }

    /// Has the poller report newcomers under this token.
    pub(crate) fn register(&mut self, registry: &mio::Registry, token: mio::Token) -> io::Result<()> {
        match &mut self.listener {
            Some(listener) => registry.register(listener, token, mio::Interest::READABLE),
            None => Ok(()),
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.listener.is_some()
    }

    /// The listener, while the door is open.
    pub(crate) fn listener(&self) -> Option<&TcpListener> {
        self.listener.as_ref()
    }

    /// Whether descriptors ran out and have not come back.
    pub(crate) fn is_starved(&self) -> bool {
        self.ballast.is_dropped()
    }

    /// When a paused door may be tried again.
    pub(crate) fn paused_until_ns(&self) -> Option<u64> {
        (self.is_open() && self.paused_until_ns != 0).then_some(self.paused_until_ns)
    }

    /// Whether `accept` may be tried now. A pause that has run out ends here, unless descriptors are still
    /// wanting.
    pub(crate) fn may_accept(&mut self, now_ns: u64) -> bool {
        if !self.is_open() || !self.ready || now_ns < self.paused_until_ns {
            return false;
        }
        if !self.ballast.take_back() {
            self.pause_from(now_ns);
            return false;
        }
        self.paused_until_ns = 0;
        true
    }

    /// Accepts one newcomer, if there is one.
    pub(crate) fn accept(&mut self, ledger: &Ledger, now_ns: u64) -> Knock {
        match &self.listener {
            Some(listener) => {
                let outcome = listener.accept();
                self.answer(outcome, ledger, now_ns)
            }
            None => Knock::Nobody,
        }
    }

    /// Decides what comes of an `accept`.
    fn answer(
        &mut self,
        outcome: io::Result<(TcpStream, std::net::SocketAddr)>,
        ledger: &Ledger,
        now_ns: u64,
    ) -> Knock {
        let error = match outcome {
            Ok((stream, peer)) => {
                self.pause = PAUSE;
                self.vanished = 0;
                return Knock::Newcomer(stream, peer);
            }
            Err(error) => error,
        };
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                self.ready = false;
                return Knock::Nobody;
            }
            io::ErrorKind::Interrupted => return Knock::Vanished,
            _ => {}
        }
        let failure = classify(&error);
        ledger.accept_failed(failure);
        if failure == AcceptFailure::Aborted {
            self.vanished += 1;
            if self.vanished < VANISHED_IN_A_ROW {
                return Knock::Vanished;
            }
            self.vanished = 0;
        }
        if failure == AcceptFailure::FdLimit {
            self.ballast.drop_all();
        }
        self.pause_from(now_ns);
        if let Some(left_out) = self.log.allow(now_ns) {
            warn!(%error, pause = ?self.pause, left_out, "cannot accept connections; trying again");
        }
        Knock::Paused
    }

    fn pause_from(&mut self, now_ns: u64) {
        self.paused_until_ns = now_ns + ns(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// From now on the kernel lets one newcomer at a time into the backlog, and that only when it is empty
    /// (so Linux reads a backlog of 0): what stands in it can be served to the end. A shared listener goes on as it is.
    pub(crate) fn stop_listening(&self) {
        if let (Some(listener), Holder::Alone) = (&self.listener, self.holder) {
            // It cannot fail on a listening socket; if it did, more would be accepted, which harms nobody.
            let _ = rustix::net::listen(listener, 0);
        }
    }

    /// From now on nobody comes who does not stand in the backlog yet. Of a listener held alone, the kernel lets
    /// nobody in any more: a socket filter drops every packet that is for the listener itself. Connections in the
    /// backlog have sockets of their own. Clients' attempts go unanswered, and are refused when they are repeated
    /// after the listener was closed. A shared one is left, and its backlog with it.
    pub(crate) fn seal(&mut self, registry: &mio::Registry) {
        /// `BPF_RET | BPF_K`: return a constant, the number of bytes to keep.
        const RETURN: u16 = 0x06;
        match (&self.listener, self.holder) {
            (Some(listener), Holder::Alone) => {
                let keep_nothing = [SockFilter::new(RETURN, 0, 0, 0)];
                // Where filters are not to be had, a newcomer may still come in for each that leaves, until the
                // deadline.
                let _ = SockRef::from(listener).attach_filter(&keep_nothing);
            }
            (Some(_), Holder::Shared) => self.close(registry),
            (None, _) => {}
        }
    }

    /// Closes the listener. Who still stands in its backlog is reset by the kernel, unless others hold it.
    pub(crate) fn close(&mut self, registry: &mio::Registry) {
        if let Some(mut listener) = self.listener.take() {
            // While others hold it, the kernel would report their newcomers here. If it fails, that is all it does.
            let _ = registry.deregister(&mut listener);
        }
        self.ready = false;
    }
}

/// The errors of `accept(2)`. It also passes on network errors that were pending on the new connection, which
/// its manual says to treat as if nothing had come.
fn classify(error: &io::Error) -> AcceptFailure {
    use rustix::io::Errno;
    match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => AcceptFailure::FdLimit,
        Some(
            Errno::CONNABORTED
            | Errno::CONNRESET
            | Errno::PROTO
            | Errno::PERM
            | Errno::NETDOWN
            | Errno::NETUNREACH
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NONET
            | Errno::NOPROTOOPT
            | Errno::OPNOTSUPP
            | Errno::TIMEDOUT,
        ) => AcceptFailure::Aborted,
        _ => AcceptFailure::Other,
    }
}

/// Spare descriptors, held so that they can be let go.
///
/// Connections can use up the descriptor table although their number is limited below it: the limit may be
/// lowered while the program runs, or other parts of it may open files. Then the metrics endpoint could
/// neither accept a scrape nor read `/proc`, just when it is needed. The spare descriptors are opened first,
/// so they also have the lowest numbers, which stay usable when the limit is lowered.
#[derive(Debug)]
pub(crate) struct Ballast {
    /// What each spare descriptor is a copy of: a socket that nobody talks to. Not the listener, whose copies would keep
    /// it listening after the door has closed.
    original: Option<OwnedFd>,
    spare: Vec<OwnedFd>,
    size: usize,
}

impl Ballast {
    /// Opens `size` spare descriptors.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let mut ballast = Ballast { original: None, spare: Vec::with_capacity(size), size };
        if size > 0 {
            let original = OwnedFd::from(UnixDatagram::unbound()?);
            while ballast.spare.len() < size {
                ballast.spare.push(original.try_clone()?);
            }
            ballast.original = Some(original);
        }
        Ok(ballast)
    }

    fn is_dropped(&self) -> bool {
        self.spare.len() < self.size
    }

    fn drop_all(&mut self) {
        self.spare.clear();
    }

    /// Takes back as many as can be had; if that is not all, keeps none. Whether all are held now.
    fn take_back(&mut self) -> bool {
        while let Some(original) = &self.original
            && self.spare.len() < self.size
        {
            match original.try_clone() {
                Ok(copy) => self.spare.push(copy),
                Err(_) => {
                    self.spare.clear();
                    return false;
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_concern_one_newcomer_do_not_pause_the_door() {
        use rustix::io::Errno;
        for (errno, failure) in [
            (Errno::MFILE, AcceptFailure::FdLimit),
            (Errno::NFILE, AcceptFailure::FdLimit),
            (Errno::CONNABORTED, AcceptFailure::Aborted),
            (Errno::PROTO, AcceptFailure::Aborted),
            (Errno::NOBUFS, AcceptFailure::Other),
            (Errno::NOMEM, AcceptFailure::Other),
            (Errno::INVAL, AcceptFailure::Other),
        ] {
            assert_eq!(classify(&errno.into()), failure, "{errno}");
        }
    }

    #[test]
    fn the_pause_doubles_up_to_a_second() {
        let listener = TcpListener::bind(([127, 0, 0, 1], 0).into()).expect("a port");
        let ballast = Ballast::new(0).expect("none");
        let mut door = Door::new(listener, Holder::Alone, ballast);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            door.pause_from(1_000_000_000);
            pauses.push((door.paused_until_ns - 1_000_000_000) / 1_000_000);
        }
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert!(!door.may_accept(1_999_999_999), "paused");
        assert!(door.may_accept(2_000_000_000), "the pause is over");
    }

    /// A door whose listener one client has come to, and that has three spare descriptors.
    fn door_with_a_newcomer() -> (Door, std::net::TcpStream) {
        let listener = TcpListener::bind(([127, 0, 0, 1], 0).into()).expect("a port");
        let client =
            std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("it listens");
        let ballast = Ballast::new(3).expect("three descriptors");
        (Door::new(listener, Holder::Alone, ballast), client)
    }

    /// Failed accepts: for want of a descriptor, of vanished clients, and others.
    fn failed(ledger: &Ledger) -> Vec<u64> {
        ledger.failed_accepts().map(|(_, count)| count).collect()
    }

    #[test]
    fn a_full_table_of_the_process_or_the_system_costs_a_pause_and_the_ballast() {
        for errno in [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE] {
            let ((mut door, client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
            assert!(matches!(door.answer(Err(errno.into()), &ledger, 1_000_000), Knock::Paused), "{errno}");
            assert_eq!(failed(&ledger), [1, 0, 0], "{errno}");
            assert!(door.is_starved(), "the spare descriptors are for others now");
            assert_eq!(door.paused_until_ns(), Some(1_000_000 + ns(PAUSE)));
            assert!(!door.may_accept(1_000_000 + ns(PAUSE) - 1));
            // Descriptors are to be had again, and who waited is let in.
            assert!(door.may_accept(1_000_000 + ns(PAUSE)) && !door.is_starved());
            match door.accept(&ledger, 2 * ns(PAUSE)) {
                Knock::Newcomer(_, peer) => assert_eq!(peer, client.local_addr().expect("an address")),
                other => panic!("{errno}: {other:?}"),
            }
            assert_eq!(door.pause, PAUSE, "the next pause is a short one again");
        }
    }

    #[test]
    fn a_newcomer_that_vanished_or_a_signal_costs_nothing() {
        for (errno, counted) in
            [(rustix::io::Errno::CONNABORTED, 1), (rustix::io::Errno::PROTO, 1), (rustix::io::Errno::INTR, 0)]
        {
            let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
            assert!(matches!(door.answer(Err(errno.into()), &ledger, 1_000_000), Knock::Vanished), "{errno}");
            assert_eq!(failed(&ledger), [0, counted, 0], "{errno}");
            assert!(door.may_accept(1_000_000) && !door.is_starved(), "{errno}: the next may be sound");
            assert!(matches!(door.accept(&ledger, 1_000_000), Knock::Newcomer(..)), "{errno}");
        }
    }

    #[test]
    fn clients_that_vanish_for_ever_cost_a_pause() {
        let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
        let mut vanish = || {
            let refused = Err(rustix::io::Errno::PERM.into());
            matches!(door.answer(refused, &ledger, 1_000_000), Knock::Vanished)
        };
        assert!((1..VANISHED_IN_A_ROW).all(|_| vanish()) && !vanish(), "the last of the row");
        assert!(!door.may_accept(1_000_000), "paused");
        assert!(door.may_accept(1_000_000 + ns(PAUSE)) && !door.is_starved());
        assert!(matches!(door.accept(&ledger, 2 * ns(PAUSE)), Knock::Newcomer(..)));
    }

    #[test]
    fn any_other_failure_costs_a_pause_and_keeps_the_ballast() {
        for errno in [rustix::io::Errno::NOMEM, rustix::io::Errno::NOBUFS, rustix::io::Errno::IO] {
            let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
            assert!(matches!(door.answer(Err(errno.into()), &ledger, 1_000_000), Knock::Paused), "{errno}");
            assert_eq!(failed(&ledger), [0, 0, 1], "{errno}");
            assert!(!door.is_starved() && !door.may_accept(1_000_000), "{errno}");
        }
    }

    #[test]
    fn a_door_is_tried_until_it_was_found_empty_or_is_closed() {
        let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
        let poll = mio::Poll::new().expect("a poller");
        assert!(door.may_accept(1));
        assert!(matches!(door.accept(&ledger, 1), Knock::Newcomer(..)) && door.may_accept(1));
        assert!(matches!(door.accept(&ledger, 1), Knock::Nobody) && !door.may_accept(1), "nobody is left");
        door.ready = true;
        assert!(door.may_accept(1));
        door.close(poll.registry());
        door.ready = true;
        assert!(!door.may_accept(1), "closed, and reported ready too late");
    }

    #[test]
    fn ballast_comes_back_whole_or_not_at_all() {
        let mut ballast = Ballast::new(3).expect("three descriptors");
        assert!(!ballast.is_dropped());
        ballast.drop_all();
        assert!(ballast.is_dropped());
        assert!(ballast.take_back());
        assert!(!ballast.is_dropped());
        assert_eq!(ballast.spare.len(), 3);
    }
}
