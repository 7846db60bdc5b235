//! The service manager, where there is one: the listeners it passes on, and what it is told in return, by systemd's
//! protocol ([`sd_listen_fds`](https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html) and
//! [`sd_notify`](https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html)).
//!
//! Guarantees: what is passed on to this process is used or refused; a message that cannot be delivered is logged once and
//! stops nothing; a manager that does not read holds up nothing for longer than a second; the watchdog hears of a life
//! that the reactor has given a sign of, not of this thread's.
//!
//! It leaves to others when to say what.

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

/// How long news waits for a manager that has not yet read what came before: its queue may hold ten messages only.
/// A heartbeat does not wait, as the next one says the same.
const PATIENCE: Duration = Duration::from_secs(1);

/// The listeners that were passed on. What was not is bound as the flags say.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    pub(crate) echo: Option<TcpListener>,
    pub(crate) metrics: Option<TcpListener>,
}

impl Listeners {
    /// Takes them over. To be called once, before any thread is started: it clears variables that announce them.
    ///
    /// # Errors
    ///
    /// In one line, what was passed on that has no use, and the remedy.
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

/// Whose each socket is, for `count` sockets with these names, separated by colons. Named as we name them, the name
/// decides; where no name is ours (unless told otherwise, systemd names a socket as its unit), the order does.
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

/// Tells the manager how the program fares. Without a manager, nobody is told.
#[derive(Debug)]
pub(crate) struct Manager {
    /// Where it hears, if there is one.
    ear: Option<OsString>,
    watchdog: Option<Duration>,
    /// The last message could not be delivered.
    deaf: bool,
}

impl Manager {
    /// As the environment says.
    pub(crate) fn from_env() -> Self {
        let watchdog = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        Manager { ear: std::env::var_os("NOTIFY_SOCKET"), watchdog, deaf: false }
    }

    /// When to [`feed`](Manager::feed) the watchdog: twice within its time, as its manual asks. Never, when there is none.
    pub(crate) fn feeding(&self) -> Receiver<Instant> {
        self.watchdog.map_or_else(crossbeam_channel::never, |limit| crossbeam_channel::tick(limit / 2))
    }

    /// Everything is started.
    pub(crate) fn ready(&mut self, status: &str) {
        self.tell(&[NotifyState::Ready, NotifyState::Status(status)], Some(PATIENCE));
    }

    /// The end has begun, and takes `longest` at most. The manager is asked for as much time, and [`MARGIN`]: it gives no
    /// less than it would have given.
    pub(crate) fn stopping(&mut self, longest: Duration) {
        let status = format!("draining, {} at most", humantime::format_duration(longest));
        // The crate's number ends at 71 minutes. A longer drain needs the manager's own limit to be longer.
        let micros = u32::try_from((longest + MARGIN).as_micros()).unwrap_or(u32::MAX);
        let news =
            [NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros), NotifyState::Status(&status)];
        self.tell(&news, Some(PATIENCE));
    }

    /// How it ended.
    pub(crate) fn ended(&mut self, status: &str) {
        self.tell(&[NotifyState::Status(status)], Some(PATIENCE));
    }

    /// Feeds the watchdog if the reactor has come round lately. A program whose reactor hangs is left to starve: the
    /// manager ends it, and starts another.
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

/// Sends a message, or fails: at once, or when the patience is over. The crate's own way waits for a manager that does
/// not read as long as it takes, and the thread that tells it is the one that takes signals.
fn send(ear: &OsStr, message: &[NotifyState<'_>], patience: Option<Duration>) -> io::Result<()> {
    let address = match ear.as_bytes() {
        // Of the names without a file, which begin with a zero byte.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(ear)?,
    };
    let text: String = message.iter().map(|state| format!("{state}\n")).collect();
    let socket = UnixDatagram::unbound()?;
    match patience {
        Some(_) => socket.set_write_timeout(patience)?,
        None => socket.set_nonblocking(true)?,
    }
    // A datagram goes whole or not at all. The service that is shipped may not call `connect`.
    socket.send_to_addr(text.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_decide_whose_a_socket_is_and_else_their_order() {
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
}
