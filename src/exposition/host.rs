//! Which `Host` of a request may read the status page.
//!
//! A web page of anybody can make its own name resolve to 127.0.0.1: *DNS rebinding*. A browser then takes a server on
//! this machine for a part of that site, and lets the site's scripts read it. But the browser still sends the site's name
//! as the `Host`. So the status page answers to a `Host` that no such site can have: an IP address, `localhost`, or a name
//! that the operator has listed.
//!
//! Requests without a `Host` are allowed, since every browser sends it.

use std::net::{Ipv4Addr, Ipv6Addr};

/// The names that are allowed besides IP addresses and `localhost`.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    /// In lower case, without a final dot.
    listed: Vec<String>,
}

impl Hosts {
    /// Allows this name, in any case and with any port.
    pub(super) fn list(&mut self, name: &str) {
        self.listed.push(without_final_dot(name).to_ascii_lowercase());
    }

    /// Whether a request with this value of `Host` may read the status page.
    pub(super) fn allow(&self, host: &[u8]) -> bool {
        let Ok(host) = std::str::from_utf8(host) else { return false };
        if let Some(rest) = host.strip_prefix('[') {
            return rest.split_once(']').is_some_and(|(address, port)| is_ipv6(address) && is_port(port));
        }
        let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
        if name.is_empty() || !is_port(port) {
            return false;
        }
        let name = without_final_dot(name);
        name.parse::<Ipv4Addr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || self.listed.iter().any(|listed| name.eq_ignore_ascii_case(listed))
    }
}

/// An address without its brackets. A client on the same link may add the zone: `fe80::1%eth0`.
fn is_ipv6(address: &str) -> bool {
    let (address, _zone) = address.split_at(address.find('%').unwrap_or(address.len()));
    address.parse::<Ipv6Addr>().is_ok()
}

/// Nothing, or a colon and digits. No digit at all is a valid port too: the scheme's.
fn is_port(port: &str) -> bool {
    port.is_empty()
        || port.strip_prefix(':').is_some_and(|port| port.bytes().all(|digit| digit.is_ascii_digit()))
}

fn without_final_dot(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> Hosts {
        let mut hosts = Hosts::default();
        hosts.list("pond.example.org");
        hosts.list("Metrics.");
        hosts
    }

    #[test]
    fn addresses_localhost_and_listed_names_are_allowed() {
        for host in [
            "127.0.0.1",
            "127.0.0.1:9464",
            "10.1.2.3:",
            "0.0.0.0:1",
            "[::1]",
            "[::1]:9464",
            "[2001:DB8::7]:80",
            "[::ffff:1.2.3.4]",
            "[fe80::1%eth0]:9464",
            "localhost",
            "localhost:9464",
            "LocalHost.:9464",
            "pond.example.org",
            "Pond.Example.ORG.:443",
            "metrics:9464",
        ] {
            assert!(hosts().allow(host.as_bytes()), "{host}");
        }
    }

    #[test]
    fn all_other_names_are_not() {
        for host in [
            "",
            ".",
            ":9464",
            "evil.example",
            "localhost.evil.example",
            "evil.localhost",
            "127.0.0.1.evil.example",
            "127.0.0.1.evil",
            "127.1",
            "0x7f.0.0.1",
            "2130706433",
            "127.0.0.1:9464:9464",
            "127.0.0.1 ",
            "127.0.0.1:http",
            "127.0.0.1, evil.example",
            "localhost..",
            "::1",
            "[::1",
            "[]",
            "[::1]evil.example",
            "[::1]:80:80",
            "[evil.example]",
            "evil.pond.example.org",
            "pond.example.org.evil.example",
            "pond.example.org@evil.example",
        ] {
            assert!(!hosts().allow(host.as_bytes()), "{host}");
        }
        assert!(!hosts().allow(b"localhost\xff"));
        assert!(!Hosts::default().allow(b"pond.example.org"));
    }
}
