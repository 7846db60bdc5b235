//! `millpond health`: if the side HTTP port answers 200 within the timeout, the exit code is 0. Otherwise the exit code is
//! 1, with the reason.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::thread::spawn;
use std::time::{Duration, Instant};

use common::{Millpond, PATIENCE, eventually};
use millpond::Exposition;
use rustix::process::Signal;

/// Long enough for a loaded machine, and shorter than [`PATIENCE`].
const TIMEOUT: &str = "--timeout=20s";

fn health(args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_millpond"))
        .arg("health")
        .args(args)
        .env_remove("MILLPOND_METRICS")
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("the program runs");
    assert_eq!(String::from_utf8_lossy(&stdout), "", "nothing on standard output");
    (status.code(), String::from_utf8(stderr).expect("text"))
}

/// Asserts that the server is healthy: exit code 0, and no output.
fn well(args: &[&str]) {
    assert_eq!(health(args, &[]), (Some(0), String::new()), "{args:?}");
}

/// Asserts that the server is not healthy: exit code 1, and one line with all these parts.
fn unwell(args: &[&str], parts: &[&str]) {
    let (code, stderr) = health(args, &[]);
    assert_eq!(code, Some(1), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("millpond: "), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "no {part:?} in {stderr}");
    }
}

/// Asserts that the health check gives up when its timeout is over: not before, and not long after.
fn gives_up(address: SocketAddr, timeout: Duration) {
    let (address, flag) = (address.to_string(), format!("--timeout={}ms", timeout.as_millis()));
    let asked = Instant::now();
    unwell(
        &[&address, &flag],
        &[&address, &format!("no answer to /healthz within {timeout:?}"), "--timeout"],
    );
    let took = asked.elapsed();
    assert!(took >= timeout && took < timeout + PATIENCE, "{took:?}");
}

/// Starts a server that calls `with_client` with its first client. Returns its address.
fn server(with_client: impl FnOnce(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    spawn(move || with_client(listener.accept().expect("a client").0));
    address
}

/// Starts a server that answers the first request with these bytes and closes the connection. Returns its address.
fn says(answer: impl AsRef<[u8]> + Send + 'static) -> String {
    let address = server(move |mut client| {
        let mut question = Vec::new();
        let mut piece = [0; 512];
        while !question.ends_with(b"\r\n\r\n") {
            let length = client.read(&mut piece).expect("a question");
            assert_ne!(length, 0, "the question ends: {question:?}");
            question.extend_from_slice(&piece[..length]);
        }
        let _ = client.write_all(answer.as_ref());
    });
    address.to_string()
}

#[test]
fn a_server_that_serves_is_healthy() {
    let mut server = Millpond::start(&[]);
    let address = server.metrics.to_string();
    well(&[&address, TIMEOUT]);
    well(&[&address, "--ready", TIMEOUT]);
    // The user may paste the --metrics address of a server that listens on all addresses.
    let everywhere = format!("0.0.0.0:{}", server.metrics.port());
    well(&[&everywhere, TIMEOUT]);
    // A health check that does not know the address takes it from the server's own variable.
    let env = [("MILLPOND_METRICS", everywhere.as_str())];
    assert_eq!(health(&[TIMEOUT], &env), (Some(0), String::new()));
    assert_eq!(server.get("/healthz").code, 200);
    assert_eq!(server.scrape().get("http_requests_total{code=\"200\",path=\"/healthz\"}"), 4.0);
    assert_eq!(server.drain(), Some(0));
    unwell(&[&address, TIMEOUT], &[&address, "no connection", "refused", "start the server"]);
}

#[test]
fn a_lame_duck_is_alive_and_not_ready() {
    let server = Millpond::start(&["--lame-duck", "1h"]);
    let address = server.metrics.to_string();
    server.signal(Signal::TERM);
    eventually("the server is in its lame duck phase", || (server.get("/readyz").code == 503).then_some(()));
    well(&[&address, TIMEOUT]);
    unwell(&[&address, "--ready", TIMEOUT], &[&address, "/readyz says 503: lame_duck"]);
}

#[test]
fn a_server_that_drains_is_alive_and_not_ready() {
    let server = Millpond::start(&["--work", "1h", "--drain-timeout", "1h"]);
    let address = server.metrics.to_string();
    let mut client = server.connect();
    client.write_all(b"an hour of work").expect("it can be sent");
    eventually("a worker has it", || (server.scrape().pool("workers_busy") == 1.0).then_some(()));
    server.signal(Signal::TERM);
    eventually("the server drains", || (server.get("/readyz").code == 503).then_some(()));
    well(&[&address, TIMEOUT]);
    unwell(&[&address, "--ready", TIMEOUT], &[&address, "/readyz says 503: draining"]);
}

#[test]
fn the_reason_of_an_unhealthy_server_is_printed() {
    let stuck = Exposition::bind(prometheus::Registry::new(), ([127, 0, 0, 1], 0).into())
        .expect("a port")
        .probe("/healthz", || Err("the reactor has not come round for 6.0s".to_owned()))
        .start()
        .expect("threads");
    let address = stuck.local_addr().to_string();
    unwell(&[&address, TIMEOUT], &[&address, "/healthz says 503: the reactor has not come round for 6.0s; "]);
    unwell(
        &[&address, "--ready", TIMEOUT],
        &[&address, "/readyz says 404: nothing is served here", "--metrics"],
    );
    stuck.stop();
}

#[test]
fn a_stopped_server_is_reported_within_the_timeout() {
    let server = Millpond::start(&[]);
    server.stop();
    // The kernel still completes connections for the stopped server.
    gives_up(server.metrics, Duration::from_millis(300));
    server.signal(Signal::CONT);
    well(&[&server.metrics.to_string(), TIMEOUT]);
}

/// One byte arrives every 20 ms, so the whole answer would take over a minute.
#[test]
fn an_answer_that_comes_byte_by_byte_ends_at_the_timeout() {
    let (ended, end) = channel();
    let address = server(move |mut client| {
        let pause = Duration::from_millis(20);
        let endless = std::iter::repeat_n(b'a', 4000);
        // The client is gone long before the last byte.
        let all_said = b"HTTP/1.1 200 OK\r\nX: ".iter().copied().chain(endless).all(|byte| {
            std::thread::sleep(pause);
            client.write_all(&[byte]).is_ok()
        });
        ended.send(all_said).expect("the test waits");
    });
    gives_up(address, Duration::from_millis(500));
    assert!(!end.recv().expect("the server ends"), "the client stayed until the last byte");
}

#[test]
fn a_timeout_is_for_connection_and_answer_together() {
    // A listen queue of length 0 holds one connection, so it is full after the first.
    let listener =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    listener.listen(0).expect("it listens");
    let address = listener.local_addr().expect("an address").as_socket().expect("of IP");
    let _first = TcpStream::connect_timeout(&address, PATIENCE).expect("the only connection");
    gives_up(address, Duration::from_millis(300));
}

#[test]
fn an_answer_that_is_not_http_is_unhealthy() {
    let echo = Millpond::start(&[]);
    let address = echo.echo.to_string();
    unwell(&[&address, TIMEOUT], &[&address, "not HTTP", "--metrics"]);
    for answer in
        [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"200 OK\r\n\r\n", b"HTTP/2.0 200 OK\r\n\r\n", &[0xff; 300]]
    {
        unwell(&[&says(answer), TIMEOUT], &["not HTTP", "--metrics"]);
    }
    let endless = [&b"HTTP/1.1 200 OK\r\nX: "[..], &[b'a'; 100_000]].concat();
    unwell(&[&says(endless), TIMEOUT], &["not HTTP"]);
}

#[test]
fn only_a_whole_200_is_healthy() {
    for yes in ["HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"] {
        well(&[&says(yes), TIMEOUT]);
    }
    for part in ["", "HTTP/1.1 2", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nServer: x\r\n"] {
        unwell(&[&says(part), TIMEOUT], &["/healthz broke off"]);
    }
    for code in ["100", "201", "204", "301", "404", "500"] {
        unwell(&[&says(format!("HTTP/1.1 {code} \r\n\r\n")), TIMEOUT], &[&format!("/healthz says {code};")]);
    }
    unwell(&[&says("HTTP/1.1 503 No\r\n\r\n\x1b[31mred\r\nand more"), TIMEOUT], &["/healthz says 503; "]);
}

#[test]
fn an_error_in_a_flag_prints_one_line_with_the_remedy() {
    for (args, parts) in [
        (&["localhost:9464"][..], &["localhost:9464", "ADDR", "give an IP address and a port"][..]),
        (&["127.0.0.1:0"], &["127.0.0.1:0", "ADDR", "give the one the server printed"]),
        (&["--timeout=0s"], &["--timeout", "above 0"]),
        (&["--redy"], &["--redy", "--ready"]),
        (&["127.0.0.1:1", "127.0.0.1:2"], &["127.0.0.1:2"]),
    ] {
        let (code, stderr) = health(args, &[]);
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{args:?}: {stderr}");
        assert!(
            stderr.starts_with("millpond: ") && stderr.contains("see millpond health --help"),
            "{stderr}"
        );
        for part in parts {
            assert!(stderr.contains(part), "no {part:?} in {stderr}");
        }
    }
    let (code, stderr) = health(&[], &[("MILLPOND_METRICS", "127.0.0.1:0")]);
    assert_eq!(code, Some(2), "{stderr}");
}
