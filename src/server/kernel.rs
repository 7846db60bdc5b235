//! What the kernel knows of a TCP socket, by `TCP_INFO`.
//!
//! The socket itself is asked, so the answer is right in whatever network namespace the socket was made. A service
//! manager's listener often belongs to another namespace, where netlink and `/proc/net/tcp` would not find it. One
//! question is one system call of about 0.3 us.
//!
//! nix makes the call, because neither std nor rustix nor socket2 has one for it, and this crate forbids unsafe code.

use std::io;
use std::os::fd::AsFd;

/// The first 152 bytes of `struct tcp_info` in Linux's `include/uapi/linux/tcp.h`, as every Linux since 4.6 fills them.
/// `libc::tcp_info` would not do: it is as long as the newest kernel's, and nix panics where the kernel's is shorter.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(unreachable_pub, reason = "nix's macro names it in a public trait")]
pub struct Info {
    state: u8,
    _flags: [u8; 7],
    _times: [u32; 4],
    /// Of a connection, segments that were sent and not acknowledged. Of a listener, connections in its queue.
    unacked: u32,
    /// Of a listener, the most connections that its queue holds.
    sacked: u32,
    _path: [u32; 18],
    _pacing: [u64; 2],
    bytes_acked: u64,
    _bytes_received: u64,
    _segments: [u32; 2],
    /// Bytes that the kernel holds and has never sent, as when the peer's window is closed.
    notsent_bytes: u32,
    _min_rtt: u32,
}

/// `TCP_CLOSE` and `TCP_LISTEN` in Linux's `include/net/tcp_states.h`.
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;

mod option {
    use nix::{getsockopt_impl, sockopt_impl};
    sockopt_impl!(TcpInfo, GetOnly, libc::IPPROTO_TCP, libc::TCP_INFO, super::Info);
}

/// How far a connection's output has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delivery {
    /// Bytes that the peer's kernel has acknowledged since the connection was made. It only rises.
    pub(crate) acked: u64,
    /// Whether the kernel holds output that the peer's kernel has not acknowledged, the end of the stream included. A
    /// connection that was reset holds none: nothing more can be delivered.
    pub(crate) pending: bool,
    /// Whether the kernel has never sent a part of it, as when the peer's window is closed.
    pub(crate) unsent: bool,
}

/// Asks how far the output of a connection has come.
///
/// # Errors
///
/// What the system said, where the socket is not a TCP socket.
pub(crate) fn delivery(stream: &impl AsFd) -> io::Result<Delivery> {
    let info = info(stream)?;
    // With a closed window nothing is unacknowledged, however much waits; a reset leaves its numbers behind.
    let unsent = info.state != CLOSE && info.notsent_bytes > 0;
    let pending = info.state != CLOSE && (info.unacked > 0 || unsent);
    Ok(Delivery { acked: info.bytes_acked, pending, unsent })
}

/// A listener's queue of connections that are complete and not yet accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListenQueue {
    /// Connections in it now.
    pub(crate) length: u32,
    /// The most it holds, after the kernel has cut what was asked for to `net.core.somaxconn`.
    pub(crate) limit: u32,
}

/// Asks for the length and the limit of a listener's queue.
///
/// # Errors
///
/// What the system said, and [`io::ErrorKind::InvalidInput`] for a socket that does not listen.
pub(crate) fn listen_queue(listener: &impl AsFd) -> io::Result<ListenQueue> {
    let info = info(listener)?;
    if info.state != LISTEN {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(ListenQueue { length: info.unacked, limit: info.sacked })
}

fn info(socket: &impl AsFd) -> io::Result<Info> {
    Ok(nix::sys::socket::getsockopt(socket, option::TcpInfo)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use socket2::{Domain, SockRef, Socket, Type};

    use super::*;

    fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(60), "not in time: {what}");
            std::thread::yield_now();
        }
    }

    /// A connection's two ends, with small buffers. The first has sent `size` bytes as far as the kernel took them.
    fn unread(size: usize) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_recv_buffer_size(16 * 1024).expect("a socket option");
        socket.connect(&listener.local_addr().expect("an address").into()).expect("it listens");
        let client = TcpStream::from(socket);
        let (server, _) = listener.accept().expect("a client");
        server.set_nonblocking(true).expect("a socket option");
        (&server).write_all(&vec![7; size]).expect("the kernel takes it");
        (server, client)
    }

    #[test]
    fn a_listener_tells_the_length_and_the_limit_of_its_queue() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        rustix::net::listen(&listener, 7).expect("it listens already");
        let address = listener.local_addr().expect("an address");
        assert_eq!(listen_queue(&listener).expect("it listens"), ListenQueue { length: 0, limit: 7 });
        let clients: Vec<_> = (0..5).map(|_| TcpStream::connect(address).expect("it listens")).collect();
        eventually("five in the queue", || listen_queue(&listener).expect("it listens").length == 5);
        assert!(listen_queue(&clients[0]).is_err(), "no listener");
        listener.accept().expect("a client");
        assert_eq!(listen_queue(&listener).expect("it listens").length, 4);
    }

    #[test]
    fn output_is_pending_until_the_peer_has_acknowledged_it() {
        const SIZE: usize = 100_000;
        let (server, mut client) = unread(SIZE);
        assert!(delivery(&server).expect("TCP").pending, "more than the client has room for");
        let before = delivery(&server).expect("TCP").acked;
        client.read_exact(&mut vec![0; SIZE]).expect("it comes");
        eventually("all is acknowledged", || !delivery(&server).expect("TCP").pending);
        assert!(delivery(&server).expect("TCP").acked > before);
    }

    #[test]
    fn a_peer_with_a_closed_window_leaves_output_pending() {
        let (server, _client) = unread(100_000);
        // Whatever was on its way has come, and the rest cannot be sent.
        eventually("nothing moves", || info(&server).expect("TCP").unacked == 0);
        let delivery = delivery(&server).expect("TCP");
        assert!(delivery.pending && delivery.unsent);
    }

    #[test]
    fn nothing_is_pending_on_a_connection_that_was_reset() {
        let (server, client) = unread(100_000);
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("a socket option");
        drop(client);
        eventually("the reset has come", || !delivery(&server).expect("TCP").pending);
        assert!(!delivery(&server).expect("TCP").unsent);
    }

    #[test]
    fn a_socket_that_is_not_tcp_is_an_error() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().expect("a pair");
        assert!(delivery(&one).is_err());
    }
}
