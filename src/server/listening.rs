//! How a server listens: its listen queue, and the TCP keepalive of the sockets it accepts.
//!
//! Guarantees: a socket accepted from a listener that [`listen`] made has the keepalive times asked for, at no system call
//! for each connection. Linux copies `SO_KEEPALIVE`, `TCP_KEEPIDLE`, `TCP_KEEPINTVL` and `TCP_KEEPCNT` from a listener to
//! every socket accepted from it. A listener that others hold too is left as it is, so [`set_keepalive`] is called for each
//! socket accepted from it.
//!
//! It leaves to others: accepting (`door.rs`), and the listen queue's limit after the kernel has cut it (`kernel.rs`).

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// The times that Linux takes as `TCP_KEEPIDLE` and `TCP_KEEPINTVL`, in seconds: `MAX_TCP_KEEPIDLE` in its
/// `include/net/tcp.h`.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(32_767);

/// Probes without an answer after which the kernel gives up. They are this share of the keepalive time apart, so a vanished
/// peer is found after about twice that time.
const PROBES: u32 = 5;

/// The keepalive time in force where `asked` is asked for: whole seconds, rounded up, within the kernel's range.
pub(crate) fn keepalive_in_force(asked: Duration) -> Duration {
    let seconds = asked.as_secs().saturating_add(u64::from(asked.subsec_nanos() > 0));
    Duration::from_secs(seconds).clamp(SHORTEST, LONGEST)
}

/// Has the kernel probe a silent peer, and fail the connection when no probe is answered. `time` is as
/// [`keepalive_in_force`] returns it.
pub(crate) fn set_keepalive(socket: &impl AsFd, time: Duration) -> io::Result<()> {
    let interval = (time / PROBES).max(SHORTEST);
    let keepalive = TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(PROBES);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

/// Binds and listens. It uses `socket2`, because std fixes the backlog.
pub(crate) fn listen(
    address: SocketAddr,
    backlog: u32,
    keepalive: Option<Duration>,
) -> io::Result<mio::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // With `SO_REUSEADDR` a restarted server may bind while connections of the one before are in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if let Some(time) = keepalive {
        // Without the option, other timeouts still close most connections of vanished clients: no reason not to start.
        let _ = set_keepalive(&socket, time);
    }
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok(mio::net::TcpListener::from_std(socket.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY_PORT: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

    /// A socket accepted from a listener of [`listen`], and its client.
    fn accepted(keepalive: Option<Duration>) -> (mio::net::TcpStream, std::net::TcpStream) {
        let listener = listen(ANY_PORT.into(), 16, keepalive).expect("a port");
        let client =
            std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("it listens");
        loop {
            match listener.accept() {
                Ok((stream, _)) => return (stream, client),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
    }

    /// Seconds of silence, seconds between probes, and probes; `None` without `SO_KEEPALIVE`.
    fn times(socket: &impl AsFd) -> Option<(u64, u64, u32)> {
        let socket = SockRef::from(socket);
        let seconds = |time: io::Result<Duration>| time.expect("a TCP socket").as_secs();
        socket.keepalive().expect("a socket").then(|| {
            let probes = socket.tcp_keepalive_retries().expect("a TCP socket");
            (seconds(socket.tcp_keepalive_time()), seconds(socket.tcp_keepalive_interval()), probes)
        })
    }

    #[test]
    fn an_accepted_socket_has_the_keepalive_times_of_its_listener() {
        let (stream, _client) = accepted(Some(Duration::from_secs(100)));
        assert_eq!(times(&stream), Some((100, 20, 5)));
        let (stream, _client) = accepted(None);
        assert_eq!(times(&stream), None);
    }

    #[test]
    fn a_socket_accepted_from_another_listener_gets_them_too() {
        let (stream, _client) = accepted(None);
        set_keepalive(&stream, Duration::from_secs(2)).expect("a TCP socket");
        assert_eq!(times(&stream), Some((2, 1, 5)), "the kernel's shortest interval is 1 s");
    }

    #[test]
    fn any_keepalive_time_becomes_one_that_the_kernel_takes() {
        let seconds = Duration::from_secs;
        for (asked, in_force) in [
            (Duration::from_nanos(1), seconds(1)),
            (seconds(1), seconds(1)),
            (Duration::from_millis(1001), seconds(2)),
            (seconds(32_767), seconds(32_767)),
            (seconds(32_768), seconds(32_767)),
            (Duration::MAX, seconds(32_767)),
        ] {
            assert_eq!(keepalive_in_force(asked), in_force, "{asked:?}");
            let (stream, _client) = accepted(None);
            set_keepalive(&stream, in_force).expect("the kernel takes it");
            let interval = (in_force.as_secs() / 5).max(1);
            assert_eq!(times(&stream), Some((in_force.as_secs(), interval, 5)), "{asked:?}");
        }
    }
}
