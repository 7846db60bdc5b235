//! The service manager, if there is one: the listeners that it passes on, and the messages that it gets, by systemd's
//! protocol ([`sd_listen_fds`](https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html) and
//! [`sd_notify`](https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html)).
//!
//! Guarantees:
//! - A socket that is passed on to this process is used or refused.
//! - A message that cannot be delivered stops nothing. The first of several in a row is logged.
//! - A manager that does not read holds up this thread for no longer than a second.
//! - The watchdog gets a message only if the reactor has come round lately. That this thread runs is not enough.
//!
//! `serve.rs` decides when to send which message.

use std::ffi::{OsStr, OsString};
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use listenfd::ListenFd;
use millpond::ServerHandle;
use sd_notify::NotifyState;
use tracing::warn;

/// The names of the listeners: `FileDescriptorName=` of a socket unit.
const ECHO: &str = "echo";
const METRICS: &str = "metrics";

/// From the drain's deadline to the exit: workers that let go late, the last scrape, the log's last lines.
const MARGIN: Duration = Duration::from_secs(5);

/// How long a message waits for a manager that has not yet read the messages before it: its queue may hold only ten.
/// A heartbeat does not wait, because the next one says the same.
const PATIENCE: Duration = Duration::from_secs(1);

/// The listeners that were passed on. A listener that was not passed on is bound as the flags say.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    pub(crate) echo: Option<TcpListener>,
    pub(crate) metrics: Option<TcpListener>,
}

impl Listeners {
    /// Takes the listeners over. Call it once, before any thread is started: it clears the variables that announce them.
    ///
    /// # Errors
    ///
    /// One line that names the sockets that have no use, and the remedy.
    pub(crate) fn take() -> Result<Listeners, String> {
        // The crate that takes the descriptors does not look at their names.
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut passed = ListenFd::from_env();
        let mut listeners = Listeners::default();
        for (index, role) in roles(&names, passed.len())?.into_iter().enumerate() {
            let listener = passed
                .take_tcp_listener(index)
                .map_err(|error| format!("the socket passed on for {role}: {error}; {REMEDY}"))?;
            let place = if role == ECHO { &mut listeners.echo } else { &mut listeners.metrics };
            *place = listener;
        }
        Ok(listeners)
    }
}

/// What to pass on.
pub(crate) const REMEDY: &str = "pass on at most two TCP sockets that listen, the echo's and the metrics': in this order, \
                                 or named echo and metrics";

/// Which listener each socket is for, of `count` sockets with these names, separated by colons. If any name is one of
/// ours, the names decide. If none is, the order does: unless told otherwise, systemd names a socket after its unit.
fn roles(names: &str, count: usize) -> Result<Vec<&'static str>, String> {
    let names: Vec<&str> = names.split(':').collect();
    let named = |name: &&str| [ECHO, METRICS].into_iter().find(|ours| ours == name);
    let roles: Vec<_> = if names.iter().any(|name| named(name).is_some()) {
        names.iter().take(count).map_while(named).collect()
    } else {
        [ECHO, METRICS].into_iter().take(count).collect()
    };
    if roles.len() < count || roles.len() == 2 && roles[0] == roles[1] {
        let names = names.join(", ");
        return Err(format!("{count} sockets were passed on, named {names}; {REMEDY}"));
    }
    Ok(roles)
}

/// Tells the manager how the program fares. Without a manager, it does nothing.
#[derive(Debug)]
pub(crate) struct Manager {
    /// The manager's socket, if there is a manager.
    ear: Option<OsString>,
    /// The manager ends the program if no heartbeat comes for this long.
    watchdog: Option<Duration>,
    /// The last message could not be delivered.
    deaf: bool,
}

impl Manager {
    /// The manager that the environment names.
    pub(crate) fn from_env() -> Self {
        let watchdog = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        Manager { ear: std::env::var_os("NOTIFY_SOCKET"), watchdog, deaf: false }
    }

    /// When to [`feed`](Manager::feed) the watchdog: twice within its time, as its manual asks. Without a watchdog, never.
    pub(crate) fn feeding(&self) -> Receiver<Instant> {
        self.watchdog.map_or_else(crossbeam_channel::never, |limit| crossbeam_channel::tick(limit / 2))
    }

    /// Says that everything is started.
    pub(crate) fn ready(&mut self, status: &str) {
        self.tell(&[NotifyState::Ready, NotifyState::Status(status)], Some(PATIENCE));
    }

    /// Says that the drain has begun and takes `longest` at most. Asks the manager for as much time and [`MARGIN`]. The
    /// manager never gives less time than it would have given unasked.
    pub(crate) fn stopping(&mut self, longest: Duration) {
        let status = format!("draining, {} at most", humantime::format_duration(longest));
        // The crate's number ends at 71 minutes. For a longer drain, the manager's own limit has to be longer.
        let micros = u32::try_from((longest + MARGIN).as_micros()).unwrap_or(u32::MAX);
        let news =
            [NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros), NotifyState::Status(&status)];
        self.tell(&news, Some(PATIENCE));
    }

    /// Says how the drain ended.
    pub(crate) fn ended(&mut self, status: &str) {
        self.tell(&[NotifyState::Status(status)], Some(PATIENCE));
    }

    /// Sends the watchdog a heartbeat if the reactor has come round lately. If the reactor hangs, no heartbeat comes, and
    /// the manager ends the program and starts another.
    pub(crate) fn feed(&mut self, server: &ServerHandle) {
        if server.health().is_ok() {
            self.tell(&[NotifyState::Watchdog], None);
        }
    }

    fn tell(&mut self, message: &[NotifyState<'_>], patience: Option<Duration>) {
        let Some(ear) = &self.ear else { return };
        match send(ear, message, patience) {
            Ok(()) => self.deaf = false,
            Err(error) => {
                if !self.deaf {
                    warn!(%error, "the service manager cannot be told; NOTIFY_SOCKET names where");
                }
                self.deaf = true;
            }
        }
    }
}

/// Sends a message, or fails at once or when the patience is over. The crate's own function would wait for a manager that
/// does not read without a limit, and this thread also takes the signals.
fn send(ear: &OsStr, message: &[NotifyState<'_>], patience: Option<Duration>) -> io::Result<()> {
    let address = match ear.as_bytes() {
        // An abstract name, which has no file. In the kernel it begins with a zero byte.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(ear)?,
    };
    let text: String = message.iter().map(|state| format!("{state}\n")).collect();
    let socket = UnixDatagram::unbound()?;
    match patience {
        Some(_) => socket.set_write_timeout(patience)?,
        None => socket.set_nonblocking(true)?,
    }
    // A datagram is sent whole or not at all. The shipped unit forbids `connect`.
    socket.send_to_addr(text.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_decide_which_listener_a_socket_is_or_else_their_order() {
        assert_eq!(roles("", 0), Ok(vec![]));
        for (names, roles_of_two) in [
            ("echo:metrics", [ECHO, METRICS]),
            ("metrics:echo", [METRICS, ECHO]),
            ("millpond.socket:millpond.socket", [ECHO, METRICS]),
            ("unknown:unknown", [ECHO, METRICS]),
            ("", [ECHO, METRICS]),
        ] {
            assert_eq!(roles(names, 2), Ok(roles_of_two.to_vec()), "{names}");
            assert_eq!(roles(names, 1), Ok(vec![roles_of_two[0]]), "{names}");
        }
    }

    #[test]
    fn a_socket_without_a_use_is_refused_with_its_name() {
        for (names, count) in [
            ("echo:echo", 2),
            ("metrics:metrics", 2),
            ("echo:other", 2),
            ("other:echo", 2),
            ("echo", 2),
            ("a:b:c", 3),
        ] {
            let message = roles(names, count).expect_err(names);
            assert!(message.contains(&names.replace(':', ", ")), "{message}");
            assert!(message.contains(REMEDY) && message.starts_with(&count.to_string()), "{message}");
        }
    }

    /// A name that no other test uses. Abstract names need no file.
    fn own_name(of: &str) -> String {
        format!("millpond-{of}-{}", std::process::id())
    }

    fn manager_at(name: &str) -> Manager {
        Manager { ear: Some(format!("@{name}").into()), watchdog: None, deaf: false }
    }

    fn listen(name: &str) -> UnixDatagram {
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let socket = UnixDatagram::bind_addr(&address).expect("a name that is free");
        socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        socket
    }

    fn next(socket: &UnixDatagram) -> String {
        let mut message = [0; 1000];
        let length = socket.recv(&mut message).expect("a message");
        String::from_utf8_lossy(&message[..length]).into_owned()
    }

    #[test]
    fn of_messages_that_fail_in_a_row_the_first_is_logged() {
        let name = own_name("log");
        let mut manager = manager_at(&name);
        for _ in 0..2 {
            manager.ended("nobody hears");
            assert!(manager.deaf, "no more is logged");
        }
        let socket = listen(&name);
        manager.ended("well");
        assert_eq!(next(&socket), "STATUS=well\n");
        assert!(!manager.deaf, "the next failure is logged again");
        drop(socket);
        manager.ended("nobody hears");
        assert!(manager.deaf);
    }

    #[test]
    fn a_manager_is_asked_for_more_time_than_the_drain_takes() {
        let name = own_name("time");
        let (socket, mut manager) = (listen(&name), manager_at(&name));
        manager.stopping(Duration::from_secs(30));
        let expected = "STOPPING=1\nEXTEND_TIMEOUT_USEC=35000000\nSTATUS=draining, 30s at most\n";
        assert_eq!(next(&socket), expected);
        // The number is one of 32 bits.
        manager.stopping(Duration::from_secs(7200));
        assert!(next(&socket).contains("EXTEND_TIMEOUT_USEC=4294967295\n"));
    }

    #[test]
    fn the_watchdog_is_fed_twice_within_its_time() {
        let limit = Duration::from_millis(200);
        let manager = Manager { ear: None, watchdog: Some(limit), deaf: false };
        let (start, feeding) = (Instant::now(), manager.feeding());
        let due = feeding.recv_timeout(Duration::from_secs(60)).expect("a time to feed");
        // The time that it was due, whenever this thread came to it.
        assert!(due.duration_since(start) < limit * 3 / 4, "{:?}", due.duration_since(start));
        let without = Manager { ear: None, watchdog: None, deaf: false };
        assert!(without.feeding().try_recv().is_err());
    }
}
