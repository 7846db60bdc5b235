//! The side HTTP endpoint: what it answers, and that no client can harm it. `siege.rs` has the readers that never read.

mod common;

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::proxy::Seed;
use common::victim::Victim;
use common::{Millpond, Response, connect, eventually, http, thread_states, try_http};
use millpond::prometheus::{IntCounter, Registry};
use millpond::{Exposition, ServerError};

#[test]
fn every_path_and_method_has_its_answer() {
    let server = Millpond::start(&[]);
    for (request, code) in [
        ("GET /metrics HTTP/1.1", 200),
        ("GET /metrics?a=b HTTP/1.1", 200),
        ("GET /metrics HTTP/1.0", 200),
        ("HEAD /metrics HTTP/1.1", 200),
        ("GET http://somewhere/healthz HTTP/1.1", 200),
        ("GET /readyz HTTP/1.1", 200),
        ("POST /metrics HTTP/1.1", 405),
        ("DELETE /readyz HTTP/1.1", 405),
        ("GET /metricsx HTTP/1.1", 404),
        ("GET /../etc/passwd HTTP/1.1", 404),
        ("POST /nowhere HTTP/1.1", 404),
        ("GET /metrics HTTP/2.0", 505),
        ("GET /metrics", 400),
        ("\u{1}\u{2}\u{3}", 400),
    ] {
        let answer = http(server.metrics, format!("{request}\r\nHost: test\r\n\r\n"));
        assert_eq!(answer.code, code, "{request}");
        assert!(answer.head.starts_with("HTTP/1.0 "), "{}", answer.head);
        let length: usize = answer.header("Content-Length").expect("a length").parse().expect("a number");
        if request.starts_with("HEAD") {
            assert!(answer.body.is_empty() && length > 1000);
        } else {
            assert_eq!(answer.body.len(), length, "{request}");
        }
    }
    let answer = server.get("/metrics");
    assert_eq!(answer.header("Content-Type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let refusal = http(server.metrics, "PUT /metrics HTTP/1.1\r\n\r\n");
    assert_eq!(refusal.header("Allow"), Some("GET, HEAD"));
    let scrape = server.scrape();
    assert_eq!(scrape.get("http_requests_total{code=\"404\",path=\"other\"}"), 3.0);
    assert_eq!(scrape.get("http_requests_total{code=\"405\",path=\"/metrics\"}"), 2.0);
}

#[test]
fn the_first_scrape_has_every_series_at_its_start() {
    let server = Millpond::start(&["--workers", "3", "--max-connections", "7"]);
    let text = server.get("/metrics").body;
    let mut found = String::new();
    for line in text.lines().filter(|line| !line.contains("process_")) {
        // The scrape itself is a job of the http pool, so its times differ. The revision is that of the build.
        let timed = line.contains("pool=\"http\"") && line.contains("_seconds");
        match line.rsplit_once(' ') {
            Some((series, _)) if timed && !line.starts_with('#') => writeln!(found, "{series} *"),
            _ => match line
                .split_once("revision=\"")
                .and_then(|(start, rest)| Some((start, rest.split_once('"')?)))
            {
                Some((start, (_, end))) => writeln!(found, "{start}revision=\"*\"{end}"),
                None => writeln!(found, "{line}"),
            },
        }
        .expect("writing to memory");
    }
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/metrics.txt");
    if std::env::var_os("MILLPOND_WRITE_GOLDEN").is_some() {
        std::fs::write(golden, &found).expect("the golden file can be written");
    }
    let expected = std::fs::read_to_string(golden).expect("the golden file");
    for (number, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "line {} of tests/golden/metrics.txt", number + 1);
    }
    assert_eq!(found.lines().count(), expected.lines().count());
}

#[test]
fn it_answers_while_every_worker_is_stuck() {
    let server = Millpond::start(&["--workers", "2", "--work", "1h"]);
    let mut clients: Vec<TcpStream> = (0..50).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.write_all(b"stuck").expect("sent"));
    eventually("48 jobs wait", || (server.scrape().pool("queue_depth") == 48.0).then_some(()));
    let start = Instant::now();
    let first = server.scrape();
    thread::sleep(Duration::from_millis(300));
    let (second, elapsed) = (server.scrape(), start.elapsed().as_secs_f64());
    // No job ends, and still the time spent and the ages rise.
    for (gauge, times) in
        [("queue_oldest_age_seconds", 1.0), ("longest_running_seconds", 1.0), ("busy_seconds_total", 2.0)]
    {
        let rise = second.pool(gauge) - first.pool(gauge);
        assert!(
            (0.29 * times..=elapsed * times * 1.01).contains(&rise),
            "{gauge} rose {rise} in {elapsed} s"
        );
    }
    assert_eq!(server.get("/healthz").code, 200, "busy workers are not a stuck reactor");
    assert_eq!(second.broken_law(), None);
}

/// An endpoint under attack.
fn target() -> Victim {
    Victim::start(&["--workers", "2"])
}

#[test]
fn absurd_lengths_are_never_believed() {
    let target = target();
    for length in ["100000000000000", "18446744073709551615", "99999999999999999999999", "-1", "x", "2000"] {
        for method in ["GET", "POST"] {
            let head = format!("{method} /metrics HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
            let answer = http(target.server.metrics, head);
            assert_eq!(answer.code, if method == "GET" { 200 } else { 405 });
        }
    }
    let answer = http(
        target.server.metrics,
        "GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
    );
    assert_eq!(answer.code, 200);
    target.unharmed();
}

#[test]
fn a_body_that_never_comes_delays_no_scrape() {
    let target = target();
    let waiting: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = connect(target.server.metrics);
            // A new connection may take its place at any time.
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nContent-Length: 2000\r\n\r\n");
            stream
        })
        .collect();
    target.scrape_in_time();
    drop(waiting);
    target.unharmed();
}

#[test]
fn an_answer_is_whole_although_a_body_follows_the_head() {
    let target = target();
    let body = vec![b'x'; 100_000];
    let request = [b"POST /metrics HTTP/1.1\r\nContent-Length: 100000\r\n\r\n".as_slice(), &body].concat();
    for _ in 0..20 {
        assert_eq!(http(target.server.metrics, &request).code, 405);
    }
    target.unharmed();
}

#[test]
fn unknown_versions_leave_nothing_behind() {
    let target = target();
    for _ in 0..50 {
        assert_eq!(http(target.server.metrics, "GET / HTTP/2.0\r\n\r\n").code, 505);
        assert_eq!(http(target.server.metrics, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").code, 505);
    }
    target.unharmed();
}

#[test]
fn a_reset_after_the_request_is_survived() {
    let target = target();
    for _ in 0..200 {
        let mut stream = connect(target.server.metrics);
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("sent");
        let socket = socket2::Socket::from(stream);
        socket.set_linger(Some(Duration::ZERO)).expect("a socket option");
    }
    target.unharmed();
}

#[test]
fn five_hundred_silent_connections_keep_no_scrape_out() {
    let target = target();
    let silent: Vec<TcpStream> = (0..500).map(|_| connect(target.server.metrics)).collect();
    for _ in 0..10 {
        target.scrape_in_time();
    }
    // After a second the kernel hands over silent connections too, and they take all places but the scrape's.
    eventually("the silent connections are accepted", || {
        target.scrape_in_time();
        (target.server.open_files() >= target.files + 15).then_some(())
    });
    for _ in 0..10 {
        target.scrape_in_time();
    }
    assert!(target.server.open_files() <= target.files + 16, "more connections than the bound");
    assert_eq!(target.server.threads(), target.threads);
    drop(silent);
    target.unharmed();
}

#[test]
fn dripping_heads_are_cut_off_and_keep_no_scrape_out() {
    let target = target();
    let mut dripping: Vec<TcpStream> = (0..16).map(|_| connect(target.server.metrics)).collect();
    let start = Instant::now();
    let mut cut = 0;
    while cut < 16 {
        // The client is cut off if its write fails, or its read finds the end or a reset.
        dripping.retain_mut(|stream| {
            let dead = stream.write_all(b"G").is_err() || {
                stream.set_nonblocking(true).expect("a socket option");
                let end = matches!(stream.read(&mut [0]), Ok(0));
                let reset = stream.take_error().is_ok_and(|error| error.is_some());
                stream.set_nonblocking(false).expect("a socket option");
                end || reset
            };
            cut += usize::from(dead);
            !dead
        });
        target.scrape_in_time();
        assert!(start.elapsed() < Duration::from_secs(20), "{cut} of 16 cut off");
        thread::sleep(Duration::from_millis(20));
    }
    target.unharmed();
}

#[test]
fn heads_without_end_are_rejected() {
    let target = target();
    for start in ["GET /metrics HTTP/1.1\r\nX: ", "", "GET /"] {
        let mut request = start.as_bytes().to_vec();
        request.extend(std::iter::repeat_n(b'a', 1024 * 1024));
        let answer: std::io::Result<Response> = try_http(target.server.metrics, request);
        assert_eq!(answer.expect("an answer, and no reset").code, 431);
    }
    let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(1000));
    assert_eq!(http(target.server.metrics, many).code, 431);
    target.unharmed();
}

/// Browsers send the cookies that any program on the same host name has set, whatever its port.
#[test]
fn cookies_of_other_programs_may_be_large() {
    let target = target();
    for (length, code) in [(9_000, 200), (32_000, 200), (33_000, 431)] {
        let cookie = "a".repeat(length);
        let head = format!("GET / HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n");
        assert_eq!(http(target.server.metrics, head).code, code, "{length} bytes");
    }
    target.unharmed();
}

/// Asks for a path with these header lines, and returns the code.
fn code_of(address: SocketAddr, path: &str, headers: &str) -> u16 {
    http(address, format!("GET {path} HTTP/1.1\r\n{headers}\r\n")).code
}

/// A web page of another site can have its own name resolve to the server's address. Then it can read the server's
/// answers to that name.
#[test]
fn the_status_page_answers_to_no_name_of_another_site() {
    let server = Millpond::start(&["--status-host", "pond.example.org,b.example", "--status-host=c.example"]);
    let address = server.metrics;
    for path in ["/", "/status.json"] {
        for host in
            ["pond.example.org", "b.example:1", "C.example.", "localhost:1", "127.0.0.1", "[::1]:9464"]
        {
            assert_eq!(code_of(address, path, &format!("Host: {host}\r\n")), 200, "{path} {host}");
            assert_eq!(code_of(address, &format!("http://{host}{path}"), ""), 200, "{path} {host}");
        }
        assert_eq!(code_of(address, path, ""), 200, "{path} without a Host, which every browser sends");
        for host in ["evil.example", "d.example", "pond.example.org.evil.example", ""] {
            assert_eq!(code_of(address, path, &format!("Host: {host}\r\n")), 421, "{path} {host}");
        }
        let evil = format!("http://evil.example{path}");
        assert_eq!(code_of(address, &evil, "Host: localhost\r\n"), 421, "{evil}");
        assert_eq!(code_of(address, path, "Host: localhost\r\nHost: evil.example\r\n"), 400, "{path}");
    }
    for path in ["/metrics", "/healthz", "/readyz", "http://evil.example/metrics"] {
        assert_eq!(code_of(address, path, "Host: evil.example\r\n"), 200, "{path}");
    }
    assert_eq!(code_of(address, "http://localhost?x=/metrics", ""), 200, "it is the page");
    let refusal = http(address, "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert!(refusal.head.starts_with("HTTP/1.0 421 Misdirected Request\r\n"), "{}", refusal.head);
    assert!(refusal.body.contains("--status-host") && refusal.body.lines().count() == 1, "{}", refusal.body);
    let scrape = server.scrape();
    assert_eq!(scrape.get("http_requests_total{code=\"421\",path=\"/\"}"), 6.0);
    assert_eq!(scrape.get("http_requests_total{code=\"421\",path=\"/status.json\"}"), 5.0);
}

#[test]
fn status_hosts_may_be_in_the_environment() {
    let server = Millpond::start_with(&[], |command| {
        command.env("MILLPOND_STATUS_HOST", "a.example,b.example");
    });
    for (host, code) in [("a.example", 200), ("b.example:9464", 200), ("c.example", 421)] {
        assert_eq!(code_of(server.metrics, "/", &format!("Host: {host}\r\n")), code, "{host}");
    }
}

/// The names and help texts in a registry.
fn contents(registry: &Registry) -> Vec<(String, String)> {
    let families = registry.gather();
    families.iter().map(|family| (family.name().to_owned(), family.help().to_owned())).collect()
}

/// No other test of this file runs an endpoint in this process.
#[test]
fn an_endpoint_that_cannot_register_its_metrics_leaves_nothing() {
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    // Afterwards the endpoints must have as many threads as now.
    let fails = |registry: &Registry, threads: usize| {
        let before = contents(registry);
        let second = Exposition::bind(registry.clone(), any_port).expect("a port");
        let address = second.local_addr();
        match second.start() {
            Err(ServerError::Registry(_)) => {}
            other => panic!("{other:?}"),
        }
        assert!(TcpStream::connect(address).is_err(), "it still listens");
        eventually("its threads are gone", || (thread_states("mill-http").len() == threads).then_some(()));
        assert_eq!(contents(registry), before);
    };

    let registry = Registry::new();
    let first = Exposition::serve(registry.clone(), any_port).expect("an endpoint");
    // Its reactor, two workers, and the thread that drops sessions.
    fails(&registry, 4);
    assert_eq!(http(first.local_addr(), "GET /metrics HTTP/1.1\r\n\r\n").code, 200, "the first is as before");
    first.stop();

    // Here the first collectors are accepted, and the last is not.
    let registry = Registry::new();
    let taken = IntCounter::new("millpond_http_accept_errors_total", "Another").expect("valid");
    registry.register(Box::new(taken.clone())).expect("the first of its name");
    fails(&registry, 0);
    fails(&registry, 0);

    let registry = Registry::new();
    let taken = IntCounter::new("millpond_http_requests_total", "Another").expect("valid");
    registry.register(Box::new(taken.clone())).expect("the first of its name");
    fails(&registry, 0);
}

#[test]
fn a_pipeline_gets_one_answer() {
    let target = target();
    let answer = http(target.server.metrics, "GET /readyz HTTP/1.1\r\n\r\n".repeat(100));
    assert_eq!((answer.code, answer.body.as_str()), (200, "ok\n"));
    target.unharmed();
}

#[test]
fn readers_that_never_read_keep_no_scrape_out() {
    let target = target();
    let lazy: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = connect(target.server.metrics);
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
            stream
        })
        .collect();
    for _ in 0..5 {
        target.scrape_in_time();
    }
    drop(lazy);
    target.unharmed();
}

#[test]
fn half_closed_and_empty_connections_leave_nothing_behind() {
    let target = target();
    for _ in 0..100 {
        let mut stream = connect(target.server.metrics);
        stream.write_all(b"GET /re").expect("sent");
        stream.shutdown(Shutdown::Write).expect("a shutdown");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the end");
        assert!(answer.is_empty());
    }
    target.unharmed();
}

#[test]
fn the_end_does_not_wait_for_attackers() {
    let mut server = Millpond::start(&[]);
    let mut attackers: Vec<TcpStream> = (0..200).map(|_| connect(server.metrics)).collect();
    for attacker in &mut attackers {
        let _ = attacker.write_all(b"GET /");
    }
    let start = Instant::now();
    assert_eq!(server.drain(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn no_connection_outlives_its_three_seconds() {
    let target = target();
    let server = &target.server;
    // Returns whether this round shows it. On a busy machine this thread or the server may be late.
    let round = || {
        let start = Instant::now();
        let mut late = connect(server.metrics);
        late.write_all(b"GET /readyz HTTP/1.1\r\n").expect("sent");
        thread::sleep(Duration::from_millis(2700));
        let sent = late.write_all(b"\r\n");
        if start.elapsed() > Duration::from_millis(2800) {
            return false;
        }
        sent.expect("sent");
        let mut answer = String::new();
        late.read_to_string(&mut answer).expect("an answer");
        assert!(answer.ends_with("ok\n"), "{answer}");
        // The client does not answer the server's end.
        let mut open_for = start.elapsed();
        eventually("closed", || {
            let now = start.elapsed();
            let is_closed = server.open_files() <= target.files;
            open_for = if is_closed { open_for } else { now };
            is_closed.then_some(())
        });
        open_for < Duration::from_millis(3400)
    };
    assert!((0..5).any(|_| round()), "five times open for more than three seconds, or the machine too busy");
}

/// One strike of an attacker. It puts connections that are to stay open into the list.
type Attack = fn(SocketAddr, &mut fastrand::Rng, &mut Vec<TcpStream>) -> io::Result<()>;

/// A connection whose reads and writes give up soon, so that an attacker that is cut off goes on to its next strike.
fn approach(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    stream.set_write_timeout(Some(Duration::from_millis(500)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends this, and reads the answer to its end.
fn ask(address: SocketAddr, request: &[u8]) -> io::Result<()> {
    let mut stream = approach(address)?;
    stream.write_all(request)?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}

fn pick(random: &mut fastrand::Rng, of: &[&str]) -> String {
    of[random.usize(..of.len())].to_owned()
}

/// A request that is cheap to answer. The test is about the scraper's place, and not about the rate of scrapes.
const PROBE: &[u8] = b"GET /readyz HTTP/1.1\r\nHost: attacker\r\n\r\n";

const ATTACKS: [(&str, Attack); 12] = [
    ("a flood of connections", |address, _, _| approach(address).map(drop)),
    ("silence", |address, _, kept| {
        kept.push(approach(address)?);
        Ok(())
    }),
    ("drips", |address, random, kept| {
        if kept.len() < 8 {
            kept.push(approach(address)?);
        }
        let one = random.usize(..kept.len());
        let dripped = kept[one].write_all(&PROBE[..1]);
        if dripped.is_err() {
            kept.swap_remove(one);
        }
        dripped
    }),
    ("a slow head", |address, random, _| {
        let mut stream = approach(address)?;
        for piece in PROBE.chunks(random.usize(1..=20)) {
            stream.write_all(piece)?;
            thread::sleep(Duration::from_millis(random.u64(0..20)));
        }
        stream.read_to_end(&mut Vec::new()).map(drop)
    }),
    ("pipelining", |address, random, _| ask(address, &PROBE.repeat(random.usize(2..200)))),
    ("an oversized head", |address, random, _| {
        let mut request = b"GET /readyz HTTP/1.1\r\nX: ".to_vec();
        request.resize(random.usize(30_000..200_000), b'x');
        ask(address, &request)
    }),
    ("an absurd length", |address, random, _| {
        let length = pick(
            random,
            &["18446744073709551616", "18446744073709551615", "9223372036854775808", "-1", "1e9", ""],
        );
        let second = pick(random, &["", "Content-Length: 1\r\n", "Transfer-Encoding: chunked\r\n"]);
        let body = pick(random, &["", "ffffffffffffffff\r\n", "0\r\n\r\n", "x"]);
        let method = pick(random, &["GET", "POST", "HEAD"]);
        let request = format!("{method} /readyz HTTP/1.1\r\nContent-Length: {length}\r\n{second}\r\n{body}");
        ask(address, request.as_bytes())
    }),
    ("a bad version", |address, random, _| {
        let version = pick(
            random,
            &["HTTP/2.0", "HTTP/0.9", "HTTP/1.2", "HTTP/9999999999.0", "HTTP/1.1.1", "http/1.1", ""],
        );
        ask(address, format!("GET /readyz {version}\r\n\r\n").as_bytes())
    }),
    ("no HTTP at all", |address, random, _| {
        let length = random.usize(1..10_000);
        ask(address, &std::iter::repeat_with(|| random.u8(..)).take(length).collect::<Vec<u8>>())
    }),
    ("a reset after the request", |address, random, _| {
        let mut stream = approach(address)?;
        // Sometimes in the middle of the request.
        stream.write_all(&PROBE[..random.usize(1..=PROBE.len())])?;
        socket2::Socket::from(stream).set_linger(Some(Duration::ZERO))
    }),
    ("a half-closed half head", |address, random, _| {
        let mut stream = approach(address)?;
        stream.write_all(&PROBE[..random.usize(..PROBE.len())])?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut Vec::new()).map(drop)
    }),
    ("an answer that the client never reads", |address, _, kept| {
        let mut stream = approach(address)?;
        kept.push(stream.try_clone()?);
        thread::sleep(Duration::from_millis(20));
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")
    }),
];

/// How long the attack lasts, and how often each attacker strikes at least.
const SIEGE: Duration = Duration::from_secs(4);
const STRIKES: usize = 50;

#[test]
fn every_attack_at_once_keeps_no_scrape_out() {
    let (seed, target) = (Seed::new(), target());
    let address = target.server.metrics;
    let strikes: Vec<AtomicUsize> = ATTACKS.iter().map(|_| AtomicUsize::new(0)).collect();
    let over = AtomicBool::new(false);
    let (scrapes, slowest) = thread::scope(|scope| {
        for ((number, (_, attack)), strikes) in ATTACKS.iter().enumerate().zip(&strikes) {
            let (mut random, over) = (seed.for_use(number as u64), &over);
            scope.spawn(move || {
                let mut kept = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    // An error means that the server has cut the attacker off, as it should.
                    let _ = attack(address, &mut random, &mut kept);
                    strikes.fetch_add(1, Ordering::Relaxed);
                    if kept.len() > 100 {
                        kept.clear();
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            });
        }
        let held = catch_unwind(AssertUnwindSafe(|| {
            let (start, mut scrapes, mut slowest) = (Instant::now(), 0, Duration::ZERO);
            while start.elapsed() < SIEGE
                || strikes.iter().any(|strikes| strikes.load(Ordering::Relaxed) < STRIKES)
            {
                slowest = slowest.max(target.scrape_in_time());
                scrapes += 1;
                thread::sleep(Duration::from_millis(20));
                assert!(start.elapsed() < common::PATIENCE, "some attackers do not strike: {strikes:?}");
            }
            (scrapes, slowest)
        }));
        over.store(true, Ordering::Relaxed);
        held.unwrap_or_else(|panic| resume_unwind(panic))
    });
    for ((name, _), strikes) in ATTACKS.iter().zip(&strikes) {
        println!("{name}: {} times", strikes.load(Ordering::Relaxed));
    }
    println!("{scrapes} scrapes, the slowest in {slowest:?}");
    target.unharmed();
}

/// CVE-2026-66752 of `tiny_http`: bodies whose length is given in two ways. The endpoint reads no body, so no request
/// can hide in one.
#[test]
fn a_request_hidden_in_a_body_is_never_served() {
    let target = target();
    let hidden = "GET /readyz HTTP/1.1\r\nHost: hidden\r\n\r\n";
    let served = |path: &str| target.server.scrape().sum("http_requests_total", &format!("path=\"{path}\""));
    let before = (served("/readyz"), served("/healthz"));
    let framings = [
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 5\r\nContent-Length: 0\r\n",
        "Transfer-Encoding: identity, chunked\r\n",
        "Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n",
        "Transfer-Encoding:\x0bchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "X: y\r\n Transfer-Encoding: chunked\r\n",
        "X: y\nTransfer-Encoding: chunked\r\n",
        "X: y\rTransfer-Encoding: chunked\r\n",
    ];
    let mut healthy = 0;
    for framing in framings {
        let request = format!("GET /healthz HTTP/1.1\r\nHost: test\r\n{framing}\r\n0\r\n\r\n{hidden}");
        let answer = http(target.server.metrics, &request);
        assert!([200, 400].contains(&answer.code), "{framing:?}: {}", answer.code);
        healthy += u32::from(answer.code == 200);
        let expected = if answer.code == 200 { "ok\n" } else { "not an HTTP request: " };
        assert!(answer.body.starts_with(expected), "{framing:?}: {}", answer.body);
        assert!(!answer.body.contains("HTTP/1.0"), "a second answer to {framing:?}: {}", answer.body);
    }
    assert!(healthy >= 6, "{healthy} of {} were served", framings.len());
    assert_eq!((served("/readyz"), served("/healthz")), (before.0, before.1 + f64::from(healthy)));
    target.unharmed();
}

/// CVE-2026-66753 of `tiny_http`: line ends in the values of response headers. Here every name and value is a constant,
/// apart from the date and the length. So no byte that a client sends gets there.
#[test]
fn nothing_that_a_client_sends_gets_into_a_header() {
    let target = target();
    let mut answers = 0;
    for evil in ["\r\nInjected: yes\r\n\r\n", "\nInjected: yes", "\rInjected: yes", "%0d%0aInjected:%20yes"] {
        for request in [
            format!("GET /{evil} HTTP/1.1\r\n\r\n"),
            format!("GET /metrics?{evil} HTTP/1.1\r\n\r\n"),
            format!("GET http://{evil}/metrics HTTP/1.1\r\n\r\n"),
            format!("{evil} /metrics HTTP/1.1\r\n\r\n"),
            format!("GET /metrics {evil}\r\n\r\n"),
            format!("PUT /metrics HTTP/1.1\r\nHost: {evil}\r\n\r\n"),
            format!("GET /readyz HTTP/1.1\r\nOrigin: {evil}\r\nReferer: {evil}\r\nCookie: {evil}\r\n\r\n"),
            format!("GET /readyz HTTP/1.1\r\nContent-Type: {evil}\r\nAccept: {evil}\r\nX{evil}: y\r\n\r\n"),
        ] {
            let answer = http(target.server.metrics, &request);
            let mut names: Vec<&str> = answer
                .head
                .lines()
                .skip(1)
                .filter_map(|line| line.split_once(": ").map(|(name, _)| name))
                .collect();
            assert_eq!(names.len(), answer.head.lines().count() - 1, "{request:?}: {}", answer.head);
            names.retain(|name| *name != "Allow");
            names.sort_unstable();
            let known = [
                "Cache-Control",
                "Content-Length",
                "Content-Type",
                "Date",
                "Server",
                "X-Content-Type-Options",
            ];
            assert_eq!(names, known, "{request:?}");
            assert!(!answer.head.contains("Injected") && !answer.body.contains("Injected"), "{request:?}");
            answers += 1;
        }
    }
    assert_eq!(answers, 32);
    target.unharmed();
}
