//! `millpond health`: asks a millpond's side HTTP port whether it is well, and says so in the exit code.
//!
//! For whoever can only run a program, such as the health check of a container with nothing else in it. Yes is a
//! whole head with the status 200, within one time for connection and answer together; anything else is no, and
//! why in one line.
//!
//! The question is `/healthz`, as who asks will restart what says no: a server that is busy, or drains, is alive,
//! and a restart would cut its clients. `--ready` asks `/readyz`, for who only sends work elsewhere.
//!
//! Addresses are numbers, as everywhere in this program, so no name is looked up, for which a container may lack files.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use clap::builder::Styles;

use super::config::{address, positive, said};
use super::{FAILED, fail};

/// The most bytes of an answer that are read. A millpond's has some two hundred.
const MAX_ANSWER: usize = 8 * 1024;

/// More headers than any such answer has.
const MAX_HEADERS: usize = 64;

/// The most characters of a server's reason that are repeated.
const MAX_REASON: usize = 200;

const ABOUT: &str = "Asks a millpond whether it is well, and says so in the exit code";

const AFTER_HELP: &str = "\
ADDR is what the server's --metrics says, and comes from MILLPOND_METRICS as it does there. 0.0.0.0 and [::] are asked at \
this machine's loopback address.

It asks /healthz: a server that is full, overloaded or draining is well, and one whose reactor is stuck is not. With --ready \
it asks /readyz, which says no to all of these.

Exit codes: 0 well; 1 not, or no answer: standard error says which; 2 usage.";

/// What `millpond health` is asked to do.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "millpond health",
    about = ABOUT,
    after_help = AFTER_HELP,
    override_usage = "millpond health [ADDR] [FLAGS]",
    styles = Styles::plain(),
    max_term_width = 100,
    args_override_self = true,
    disable_help_flag = true
)]
pub(crate) struct Flags {
    /// The server's side HTTP port
    #[arg(value_name = "ADDR", default_value = "127.0.0.1:9464", value_parser = side_port)]
    #[arg(env = "MILLPOND_METRICS", hide_env_values = true)]
    pub(super) address: SocketAddr,

    /// Ask whether new work is welcome, and not only whether it is alive
    #[arg(long, help_heading = "Flags")]
    pub(super) ready: bool,

    /// How long the connection and the answer may take together
    #[arg(long, value_name = "DUR", default_value = "2s", help_heading = "Flags", value_parser = positive)]
    pub(super) timeout: Duration,

    /// Print this help
    #[arg(short, long, help_heading = "Flags", action = clap::ArgAction::Help)]
    help: Option<bool>,
}

/// An address to ask: port 0 is good to listen on only.
fn side_port(text: &str) -> Result<SocketAddr, String> {
    match address(text)? {
        address if address.port() == 0 => Err("port 0 is any: give the one the server printed".to_owned()),
        address => Ok(address),
    }
}

/// Parses what follows `health` on the command line. `Err` is the exit code, after help was printed or a mistake
/// was named.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Flags, ExitCode> {
    let args = std::iter::once(OsString::from("millpond health")).chain(args);
    Flags::try_parse_from(args).map_err(|error| said(&error, "see millpond health --help"))
}

/// Asks, for `--timeout` at most. Says nothing when all is well.
pub(crate) fn run(flags: &Flags) -> ExitCode {
    let path = if flags.ready { "/readyz" } else { "/healthz" };
    match ask(reachable(flags.address), path, flags.timeout) {
        Ok(()) => ExitCode::SUCCESS,
        Err((address, why)) => fail(
            FAILED,
            format_args!("health: {address}: {}; {}", why.what(path, flags.timeout), why.remedy()),
        ),
    }
}

/// Where to ask a server that listens on this address. One that listens on all of them is asked on this machine.
fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

/// Asks, and tells where it asked when the answer is no.
fn ask(address: SocketAddr, path: &str, timeout: Duration) -> Result<(), (SocketAddr, Unwell)> {
    let deadline = Instant::now() + timeout;
    let (address, connected) = match TcpStream::connect_timeout(&address, timeout) {
        // A container without IPv6 has no ::1, and what listens on [::] there is reached by IPv4.
        Err(error) if address.ip() == Ipv6Addr::LOCALHOST && error.kind() == ErrorKind::AddrNotAvailable => {
            let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port());
            (address, TcpStream::connect_timeout(&address, timeout))
        }
        connected => (address, connected),
    };
    let answered = match connected {
        Ok(stream) => hear(stream, address, path, deadline),
        Err(error) if error.kind() == ErrorKind::TimedOut => Err(Unwell::Late),
        Err(error) => Err(Unwell::Unreachable(error)),
    };
    answered.map_err(|why| (address, why))
}

/// Sends the question and reads the answer, as much of it as is needed.
fn hear(mut stream: TcpStream, address: SocketAddr, path: &str, deadline: Instant) -> Result<(), Unwell> {
    let question = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    // The buffer of a new connection has room for it, so this does not wait.
    stream.write_all(question.as_bytes()).map_err(Unwell::Cut)?;
    let mut answer = Vec::new();
    let mut piece = [0; 1024];
    let end = loop {
        match judge(&answer)? {
            Some(Head { code: 200, .. }) => return Ok(()),
            _ if answer.len() >= MAX_ANSWER => break Unwell::NotHttp,
            _ => {}
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break Unwell::Late;
        }
        stream.set_read_timeout(Some(left)).map_err(Unwell::Cut)?;
        match stream.read(&mut piece) {
            Ok(0) => break Unwell::Cut(ErrorKind::UnexpectedEof.into()),
            Ok(length) => answer.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                break Unwell::Late;
            }
            Err(error) => break Unwell::Cut(error),
        }
    };
    // However the answer ended: once there is a status, that is what was said.
    Err(match judge(&answer)? {
        Some(Head { code, length }) => Unwell::No(code, reason(&answer[length..])),
        None => end,
    })
}

/// What matters of the head of an answer.
struct Head {
    code: u16,
    length: usize,
}

/// The head of the answer, once it is whole.
fn judge(answer: &[u8]) -> Result<Option<Head>, Unwell> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(answer) {
        Ok(httparse::Status::Complete(length)) => Ok(response.code.map(|code| Head { code, length })),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(_) => Err(Unwell::NotHttp),
    }
}

/// The first line of a body, as far as it can stand in a line of ours.
fn reason(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    text.trim_start().chars().take_while(|char| !char.is_control()).take(MAX_REASON).collect()
}

/// Why the answer is no.
enum Unwell {
    /// No connection.
    Unreachable(io::Error),
    /// Not within the time.
    Late,
    /// The connection ended before the head of the answer did.
    Cut(io::Error),
    /// An answer, but not of HTTP.
    NotHttp,
    /// Another status than 200, and what was said with it.
    No(u16, String),
}

impl Unwell {
    fn what(&self, path: &str, timeout: Duration) -> impl fmt::Display {
        match self {
            Unwell::Unreachable(error) => format!("no connection: {error}"),
            Unwell::Late => format!("no answer to {path} within {timeout:?}"),
            Unwell::Cut(error) => format!("the answer to {path} broke off: {error}"),
            Unwell::NotHttp => format!("the answer to {path} is not HTTP"),
            Unwell::No(code, reason) if reason.is_empty() => format!("{path} says {code}"),
            Unwell::No(code, reason) => format!("{path} says {code}: {reason}"),
        }
    }

    fn remedy(&self) -> &'static str {
        match self {
            Unwell::Unreachable(_) => "start the server, or give what its --metrics says",
            Unwell::Late => "if it stays so, restart the server, or give a longer --timeout",
            Unwell::Cut(_) | Unwell::NotHttp => "give what the server's --metrics says",
            Unwell::No(503, _) => "the server's log may say more; give it time",
            Unwell::No(..) => "give what the --metrics of a millpond says",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::one_line;
    use super::*;

    fn parsed(args: &[&str]) -> Result<Flags, String> {
        let args = ["millpond health"].iter().chain(args);
        Flags::try_parse_from(args).map_err(|error| one_line(&error.render().to_string(), "see"))
    }

    #[test]
    fn the_defaults_are_those_of_the_documentation() {
        let flags = parsed(&[]).expect("defaults");
        assert_eq!(flags.address, ([127, 0, 0, 1], 9464).into());
        assert_eq!((flags.ready, flags.timeout), (false, Duration::from_secs(2)));
    }

    #[test]
    fn both_ends_of_each_range_are_allowed_and_nothing_beyond() {
        super::super::assert_takes("--timeout", ["1ns", "365d"], ["0s", "366d"], parsed);
        for good in ["127.0.0.1:1", "[::]:65535"] {
            assert!(parsed(&[good]).is_ok(), "{good}");
        }
        for bad in
            ["127.0.0.1:0", "[::1]:65536", "localhost:9464", "9464", "127.0.0.1", "http://127.0.0.1:9464", ""]
        {
            let message = parsed(&[bad]).expect_err(bad);
            assert!(
                message.contains("ADDR") && message.contains("give") && !message.contains('\n'),
                "{message}"
            );
        }
    }

    #[test]
    fn who_listens_everywhere_is_asked_on_this_machine() {
        for (listening, asked) in [
            ("0.0.0.0:9464", "127.0.0.1:9464"),
            ("[::]:9464", "[::1]:9464"),
            ("192.0.2.1:9464", "192.0.2.1:9464"),
            ("[2001:db8::1]:9464", "[2001:db8::1]:9464"),
        ] {
            let listening: SocketAddr = listening.parse().expect("an address");
            assert_eq!(reachable(listening).to_string(), asked);
        }
    }

    #[test]
    fn a_reason_is_one_line_of_bounded_length() {
        assert_eq!(reason(b"draining\n"), "draining");
        assert_eq!(reason(b"\r\n\x1b[31m"), "");
        assert_eq!(reason(b"one\r\ntwo"), "one");
        assert_eq!(reason(&[b'a'; 1000]).len(), MAX_REASON);
        assert_eq!(reason(b"\xff\xfe"), "\u{fffd}\u{fffd}");
    }
}
