//! The door: the listener, and what the server does when `accept` fails.
//!
//! Guarantees:
//! - The server holds no more than `max_connections` open connections. At the limit, or while the oldest job in the
//!   queue is older than allowed, a new client waits in the listen queue, is refused, or takes the place of an idle
//!   connection. [`Overload`] chooses which.
//! - No `accept` error ends accepting. The door counts each error. An error pauses the door for 10 ms at first, and
//!   for up to a second if errors go on, so that a full descriptor table costs no processor time.
//! - A client that vanished before it was accepted does not pause the door. [`VANISHED_IN_A_ROW`] such clients
//!   without a success between them do, because a system may report every client as vanished.
//! - Other parts of the process still get descriptors when the door has used the last one. The door holds spare
//!   descriptors, the [`Ballast`], and closes them at the first failure. It accepts again when it holds all of them
//!   again.

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

/// So many vanished clients in a row pause the door: as many as the reactor accepts at a time. A security policy that
/// refuses every `accept` looks like this, and the listener stays ready all the while.
const VANISHED_IN_A_ROW: u32 = 64;

/// What a server does with new clients that it has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overload {
    /// Stops accepting. New clients wait in the listen queue until there is room, or give up.
    Wait,
    /// Accepts new clients, closes them at once, and counts them by reason. They can go to another server.
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

/// Which processes hold the listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// This process alone. The listen queue ends with it.
    Alone,
    /// Other processes too. They accept the clients in the listen queue that this process leaves there.
    Shared,
}

/// The listener and its pauses.
#[derive(Debug)]
pub(crate) struct Door {
    /// `None` after the drain has emptied the listen queue, or has left it to other processes.
    listener: Option<TcpListener>,
    holder: Holder,
    /// The kernel reported the listener ready, and `accept` has not found its queue empty since.
    pub(crate) ready: bool,
    /// When the pause ends, by the server's clock; 0 if the door is not paused.
    paused_until_ns: u64,
    /// How long the next pause lasts.
    pause: Duration,
    /// How many clients vanished since the last success or pause.
    vanished: u32,
    ballast: Ballast,
    log: LogLimit,
}

/// What one `accept` led to.
#[derive(Debug)]
pub(crate) enum Knock {
    /// A new client and its address.
    Newcomer(TcpStream, std::net::SocketAddr),
    /// The listen queue is empty.
    Nobody,
    /// A client vanished before it was accepted, or a signal came. The next `accept` may succeed.
    Vanished,
    /// `accept` failed, and the door is paused now.
    Paused,
}

impl Door {
    pub(crate) fn new(listener: TcpListener, holder: Holder, ballast: Ballast) -> Self {
        Door {
            listener: Some(listener),
            holder,
            // Clients may have connected before the listener was registered with the poller.
            ready: true,
            paused_until_ns: 0,
            pause: PAUSE,
            vanished: 0,
            ballast,
            log: LogLimit::default(),
        }
    }

    /// Registers the listener with the poller, under this token.
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

    /// Whether descriptors ran out, and the spare ones could not all be opened again yet.
    pub(crate) fn is_starved(&self) -> bool {
        self.ballast.is_dropped()
    }

    /// When a pause ends, by the server's clock; `None` if the door is not paused. The reactor must wake at this time:
    /// no event tells it of the end of a pause.
    pub(crate) fn paused_until_ns(&self) -> Option<u64> {
        (self.is_open() && self.paused_until_ns != 0).then_some(self.paused_until_ns)
    }

    /// Whether the reactor may call [`accept`](Door::accept) now. A pause whose time is over ends here, but if the spare
    /// descriptors cannot all be opened, another pause begins.
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

    /// Accepts one client, if one is in the listen queue.
    pub(crate) fn accept(&mut self, ledger: &Ledger, now_ns: u64) -> Knock {
        match &self.listener {
            Some(listener) => {
                let outcome = listener.accept();
                self.answer(outcome, ledger, now_ns)
            }
            None => Knock::Nobody,
        }
    }

    /// Decides what follows from the outcome of an `accept`.
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

    /// Begins a pause, and doubles the next one up to [`LONGEST_PAUSE`].
    fn pause_from(&mut self, now_ns: u64) {
        self.paused_until_ns = now_ns + ns(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// Keeps the listen queue at one client from now on, so that the server can come to its end. Linux reads a backlog of
    /// 0 like this: it lets a client in only while the queue is empty. A shared listener stays as it is.
    pub(crate) fn stop_listening(&self) {
        if let (Some(listener), Holder::Alone) = (&self.listener, self.holder) {
            // It cannot fail on a listening socket. If it did, the server would only accept more clients.
            let _ = rustix::net::listen(listener, 0);
        }
    }

    /// Keeps every further client out of the listen queue.
    ///
    /// If this process alone holds the listener, it attaches a socket filter that drops every packet for the listener
    /// itself. Connections in the queue have sockets of their own, so they stay. The kernel does not answer further
    /// clients, and refuses them when they try again after the listener is closed. A shared listener is closed here, and
    /// other processes accept from its queue.
    pub(crate) fn seal(&mut self, registry: &mio::Registry) {
        /// `BPF_RET | BPF_K`: return a constant, the number of bytes to keep.
        const RETURN: u16 = 0x06;
        match (&self.listener, self.holder) {
            (Some(listener), Holder::Alone) => {
                let keep_nothing = [SockFilter::new(RETURN, 0, 0, 0)];
                // If the kernel has no filters, one further client may come in for each that is accepted, until the
                // drain's deadline.
                let _ = SockRef::from(listener).attach_filter(&keep_nothing);
            }
            (Some(_), Holder::Shared) => self.close(registry),
            (None, _) => {}
        }
    }

    /// Closes the listener. The kernel resets the clients in its queue, unless other processes hold the listener too.
    pub(crate) fn close(&mut self, registry: &mio::Registry) {
        if let Some(mut listener) = self.listener.take() {
            // While other processes hold it, the kernel would go on to report their clients here. If this fails, the
            // reports come, and cost a wake-up each.
            let _ = registry.deregister(&mut listener);
        }
        self.ready = false;
    }
}

/// Sorts the errors of `accept(2)`. Linux also passes on network errors that were pending on the new connection. The
/// manual says to treat those as if no client had come.
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

/// Spare descriptors, held so that they can be closed when descriptors run out.
///
/// Connections can use up the descriptor table although `max_connections` is below its size: the limit may be lowered
/// while the program runs, or other parts of the program may open files. Without spare descriptors the metrics endpoint
/// could then neither accept a scrape nor read `/proc`. The spare descriptors are opened first, so they have the
/// lowest numbers, which stay usable when the limit is lowered.
#[derive(Debug)]
pub(crate) struct Ballast {
    /// Each spare descriptor is a copy of this unused socket. Copies of the listener would keep it listening after the
    /// door has closed it.
    original: Option<OwnedFd>,
    spare: Vec<OwnedFd>,
    /// How many spare descriptors there are when all are held.
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

    /// Opens all spare descriptors again. If the system refuses one, it closes the others, so that the rest of the process
    /// can use them. Returns whether all are held now.
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
    fn accept_errors_are_sorted_by_what_they_mean() {
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

    /// A door with three spare descriptors and one client in its listen queue, and that client.
    fn door_with_a_newcomer() -> (Door, std::net::TcpStream) {
        let listener = TcpListener::bind(([127, 0, 0, 1], 0).into()).expect("a port");
        let client =
            std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("it listens");
        let ballast = Ballast::new(3).expect("three descriptors");
        (Door::new(listener, Holder::Alone, ballast), client)
    }

    /// How many accepts have failed: for lack of a descriptor, because the client vanished, and for another reason.
    fn failed(ledger: &Ledger) -> Vec<u64> {
        ledger.failed_accepts().map(|(_, count)| count).collect()
    }

    #[test]
    fn a_full_descriptor_table_pauses_the_door_and_closes_the_spare_descriptors() {
        for errno in [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE] {
            let ((mut door, client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
            assert!(matches!(door.answer(Err(errno.into()), &ledger, 1_000_000), Knock::Paused), "{errno}");
            assert_eq!(failed(&ledger), [1, 0, 0], "{errno}");
            assert!(door.is_starved(), "the rest of the process can use the spare descriptors now");
            assert_eq!(door.paused_until_ns(), Some(1_000_000 + ns(PAUSE)));
            assert!(!door.may_accept(1_000_000 + ns(PAUSE) - 1));
            // There are descriptors again, and the door accepts the client that waited.
            assert!(door.may_accept(1_000_000 + ns(PAUSE)) && !door.is_starved());
            assert_eq!(door.paused_until_ns(), None, "the reactor would wake at once, again and again");
            match door.accept(&ledger, 2 * ns(PAUSE)) {
                Knock::Newcomer(_, peer) => assert_eq!(peer, client.local_addr().expect("an address")),
                other => panic!("{errno}: {other:?}"),
            }
            assert_eq!(door.pause, PAUSE, "the next pause is short again");
        }
    }

    #[test]
    fn a_vanished_client_or_a_signal_does_not_pause_the_door() {
        for (errno, counted) in
            [(rustix::io::Errno::CONNABORTED, 1), (rustix::io::Errno::PROTO, 1), (rustix::io::Errno::INTR, 0)]
        {
            let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
            assert!(matches!(door.answer(Err(errno.into()), &ledger, 1_000_000), Knock::Vanished), "{errno}");
            assert_eq!(failed(&ledger), [0, counted, 0], "{errno}");
            assert!(door.may_accept(1_000_000) && !door.is_starved(), "{errno}: the next accept may succeed");
            assert!(matches!(door.accept(&ledger, 1_000_000), Knock::Newcomer(..)), "{errno}");
        }
    }

    /// Lets so many clients in a row vanish. Returns whether none of them paused the door.
    fn vanish(door: &mut Door, ledger: &Ledger, clients: u32) -> bool {
        (0..clients).all(|_| {
            let refused = Err(rustix::io::Errno::PERM.into());
            matches!(door.answer(refused, ledger, 1_000_000), Knock::Vanished)
        })
    }

    #[test]
    fn clients_that_vanish_for_ever_pause_the_door() {
        let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
        assert!(vanish(&mut door, &ledger, VANISHED_IN_A_ROW - 1), "too few for a pause");
        assert!(!vanish(&mut door, &ledger, 1), "the last of the row");
        assert!(!door.may_accept(1_000_000), "paused");
        assert!(door.may_accept(1_000_000 + ns(PAUSE)) && !door.is_starved());
        assert!(vanish(&mut door, &ledger, VANISHED_IN_A_ROW - 1), "the count begins anew after the pause");
        assert!(matches!(door.accept(&ledger, 2 * ns(PAUSE)), Knock::Newcomer(..)));
    }

    #[test]
    fn an_accepted_client_ends_a_row_of_vanished_ones() {
        let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
        assert!(vanish(&mut door, &ledger, VANISHED_IN_A_ROW - 1));
        assert!(matches!(door.accept(&ledger, 1_000_000), Knock::Newcomer(..)));
        assert!(vanish(&mut door, &ledger, VANISHED_IN_A_ROW - 1), "no client of the row before counts");
        assert!(!vanish(&mut door, &ledger, 1), "the last of the new row");
    }

    #[test]
    fn any_other_failure_pauses_the_door_and_keeps_the_spare_descriptors() {
        for errno in [rustix::io::Errno::NOMEM, rustix::io::Errno::NOBUFS, rustix::io::Errno::IO] {
            let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
            assert!(matches!(door.answer(Err(errno.into()), &ledger, 1_000_000), Knock::Paused), "{errno}");
            assert_eq!(failed(&ledger), [0, 0, 1], "{errno}");
            assert!(!door.is_starved() && !door.may_accept(1_000_000), "{errno}");
        }
    }

    #[test]
    fn the_door_accepts_until_its_queue_is_empty_or_it_is_closed() {
        let ((mut door, _client), ledger) = (door_with_a_newcomer(), Ledger::new(1));
        let poll = mio::Poll::new().expect("a poller");
        assert!(door.may_accept(1));
        assert!(matches!(door.accept(&ledger, 1), Knock::Newcomer(..)) && door.may_accept(1));
        assert!(
            matches!(door.accept(&ledger, 1), Knock::Nobody) && !door.may_accept(1),
            "the queue is empty"
        );
        door.ready = true;
        assert!(door.may_accept(1));
        door.close(poll.registry());
        door.ready = true;
        assert!(!door.may_accept(1), "closed; the report that it is ready came too late");
    }

    #[test]
    fn all_spare_descriptors_are_opened_again() {
        let mut ballast = Ballast::new(3).expect("three descriptors");
        assert!(!ballast.is_dropped());
        ballast.drop_all();
        assert!(ballast.is_dropped());
        assert!(ballast.take_back());
        assert!(!ballast.is_dropped());
        assert_eq!(ballast.spare.len(), 3);
    }
}
