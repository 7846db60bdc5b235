//! A listener that hands over a connection once its client has sent something: `TCP_DEFER_ACCEPT`.
//!
//! Linux then ignores the packet that completes the handshake, and makes the connection when the first data arrives. A
//! client that says nothing takes no place in the server. Nor can its place be taken between its connect and its request.
//!
//! It is no guarantee. After [`PATIENCE`] the kernel hands over a silent connection too. When its queue of half-open
//! connections is full, it falls back to SYN cookies, which know nothing of this option.
//!
//! nix makes the call, because neither std nor rustix nor socket2 has one for it, and this crate forbids unsafe code.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long the kernel waits for data: the shortest time there is, one retransmission of the handshake's answer.
const PATIENCE: Duration = Duration::from_secs(1);

mod option {
    use nix::{setsockopt_impl, sockopt_impl};
    sockopt_impl!(TcpDeferAccept, SetOnly, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, libc::c_int);
}

/// Makes the listener wait for each client's first data.
///
/// # Errors
///
/// What the system said.
pub(super) fn defer_accept(listener: &impl AsFd) -> io::Result<()> {
    let seconds = libc::c_int::try_from(PATIENCE.as_secs()).expect("a second fits");
    Ok(nix::sys::socket::setsockopt(listener, option::TcpDeferAccept, &seconds)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_client_is_accepted_once_it_has_sent_something() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        defer_accept(&listener).expect("a socket option");
        let address = listener.local_addr().expect("an address");
        let _silent = TcpStream::connect(address).expect("it listens");
        let mut speaks = TcpStream::connect(address).expect("it listens");
        speaks.write_all(b"hello").expect("sent");
        let (accepted, peer) = listener.accept().expect("a client");
        assert_eq!(peer, speaks.local_addr().expect("an address"), "the second is the first to be accepted");
        let mut first = [0; 5];
        accepted.set_nonblocking(true).expect("a socket option");
        assert_eq!(accepted.peek(&mut first).expect("its data is there"), 5);
    }
}
