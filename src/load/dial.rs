//! Opening sockets.
//!
//! The addresses and ports of a connection distinguish it from others. So from one source address to one service there
//! are only as many connections as there are local ports, some 28,000. A closed connection keeps its port for a minute
//! ([TIME_WAIT]). A reset would cut that short, but lose data that is still on its way.
//!
//! Every address in 127.0.0.0/8 is this machine. So towards one of them connections come from several source addresses:
//! as many as the connections need, or [`CHURN_SOURCES`]. Towards any other address the kernel chooses the source. If
//! no port is left, the report counts that as [`Failure::NoPorts`](super::Failure::NoPorts).
//!
//! [TIME_WAIT]: https://datatracker.ietf.org/doc/html/rfc9293#section-3.4.1

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mio::net::TcpStream;
use socket2::{Domain, Protocol, Socket, Type};

use super::plan::Plan;

/// The most connections from one source address, in hundredths of the local ports. By default Linux gives out 28,232
/// ports, and this is 19,762 of them. So the kernel finds a free port at once, and other programs find one too.
const PORTS_USED_PERCENT: usize = 70;

/// The number of local ports, if the kernel does not report how many it gives out.
const PORTS: usize = 28_232;

/// Source addresses if every message has a new connection. They have seven million ports, so each port can rest for a
/// minute even at 100,000 connections a second.
const CHURN_SOURCES: u64 = 250;

/// Opens sockets to one address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dial {
    address: SocketAddr,
    /// The number of source addresses that take turns. If it is 0, the kernel chooses the source.
    sources: u64,
}

impl Dial {
    pub(super) fn new(plan: &Plan) -> Self {
        Self::with_ports(plan, local_ports())
    }

    /// As [`new`](Dial::new), with this number of local ports.
    fn with_ports(plan: &Plan, ports: usize) -> Self {
        let per_source = (ports * PORTS_USED_PERCENT / 100).max(1);
        let all = plan.connections + plan.idle;
        let sources = match plan.address.ip() {
            IpAddr::V4(ip) if ip.is_loopback() => {
                let needed = all.div_ceil(per_source) as u64;
                if plan.churn { CHURN_SOURCES } else { needed }
            }
            _ => 0,
        };
        // If one source is enough, the kernel can choose it.
        Dial { address: plan.address, sources: if sources > 1 { sources } else { 0 } }
    }

    /// The source address of the connection of this number, from 127.0.0.2 on.
    fn source(self, number: u64) -> Option<IpAddr> {
        let turn = number.checked_rem(self.sources)?;
        let [_, _, third, fourth] = u32::try_from(turn + 2).unwrap_or(u32::MAX).to_be_bytes();
        Some(Ipv4Addr::new(127, 0, third, fourth).into())
    }

    /// Begins to open the connection of this number. It is open, or has failed, when it is writable.
    pub(super) fn open(self, number: u64) -> io::Result<TcpStream> {
        let socket = Socket::new(
            Domain::for_address(self.address),
            Type::STREAM.nonblocking().cloexec(),
            Some(Protocol::TCP),
        )?;
        // A message is sent as a whole, so the kernel need not wait for more.
        socket.set_tcp_nodelay(true)?;
        if let Some(source) = self.source(number) {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        match socket.connect(&self.address.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
        Ok(TcpStream::from_std(socket.into()))
    }
}

/// The number of local ports that the kernel gives out.
pub(crate) fn local_ports() -> usize {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ends = range.split_whitespace().map_while(|end| end.parse::<usize>().ok());
    match (ends.next(), ends.next()) {
        (Some(first), Some(last)) if first <= last => last - first + 1,
        _ => PORTS,
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::plan;
    use super::*;

    fn sources(plan: &Plan) -> u64 {
        Dial::with_ports(plan, 1000).sources
    }

    #[test]
    fn one_source_is_enough_for_as_many_as_it_has_ports() {
        let plan = Plan { connections: 695, idle: 5, ..plan() };
        assert_eq!(sources(&plan), 0);
        assert_eq!(sources(&Plan { idle: 6, ..plan.clone() }), 2);
        assert_eq!(sources(&Plan { connections: 1, churn: true, idle: 0, ..plan.clone() }), CHURN_SOURCES);
        for elsewhere in ["192.0.2.1:7", "[::1]:7"] {
            let address = elsewhere.parse().expect("an address");
            assert_eq!(sources(&Plan { idle: 100_000, churn: true, address, ..plan.clone() }), 0);
        }
    }

    #[test]
    fn the_kernel_says_how_many_ports_there_are() {
        assert!((1..=65_536).contains(&local_ports()));
    }

    #[test]
    fn sources_take_turns() {
        let dial = Dial { address: ([127, 0, 0, 1], 7).into(), sources: 300 };
        let source = |number| dial.source(number).map(|ip| ip.to_string()).unwrap_or_default();
        assert_eq!([source(0), source(1), source(300)], ["127.0.0.2", "127.0.0.3", "127.0.0.2"]);
        assert_eq!([source(253), source(254)], ["127.0.0.255", "127.0.1.0"]);
        assert_eq!(Dial { sources: 0, ..dial }.source(5), None);
    }
}
