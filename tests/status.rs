//! The shape of `/status.json`, the truth of its numbers, and the page that shows it.

mod common;

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use common::clients::Load;
use common::{Millpond, eventually, http, ping};
use millpond::{Exposition, prometheus};
use rustix::process::Signal;
use serde_json::Value;

fn status(server: &Millpond) -> Value {
    let answer = server.get("/status.json");
    assert_eq!((answer.code, answer.header("Content-Type")), (200, Some("application/json")));
    assert_eq!(answer.header("Cache-Control"), Some("no-store"));
    serde_json::from_str(&answer.body).expect("JSON")
}

fn number(status: &Value, path: &str) -> f64 {
    status.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number at {path} in {status}"))
}

fn sum(status: &Value, path: &str) -> f64 {
    let names = status.pointer(path).and_then(Value::as_object).expect("an object");
    names.values().filter_map(Value::as_f64).sum()
}

fn rows<'a>(status: &'a Value, state: &str) -> Vec<&'a Value> {
    let rows = status["workers"].as_array().expect("rows");
    rows.iter().filter(|row| row["state"] == state).collect()
}

/// Describes the numbers of one answer if they do not add up.
fn broken_law(status: &Value) -> Option<String> {
    let open: f64 = ["idle", "queued", "active", "closing"]
        .map(|state| number(status, &format!("/connections/{state}")))
        .iter()
        .sum();
    let accepted =
        (number(status, "/connections/accepted_total"), open + sum(status, "/connections/closed_total"));
    let submitted = (
        number(status, "/pool/submitted_total"),
        sum(status, "/pool/jobs_total") + number(status, "/pool/queue_depth") + number(status, "/pool/busy"),
    );
    let future = status["workers"]
        .as_array()
        .expect("rows")
        .iter()
        .any(|row| number(row, "/since_seconds") > number(status, "/uptime_seconds"));
    let unequal = accepted.0 != accepted.1 || submitted.0 != submitted.1;
    let backwards = number(status, "/sent_bytes_total") > number(status, "/received_bytes_total");
    (unequal || backwards || future)
        .then(|| format!("accepted {accepted:?}, submitted {submitted:?}, or bytes or times, in {status}"))
}

/// Writes every path of a document, with the kind of its value.
fn shape(value: &Value, path: &str, lines: &mut String) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                shape(value, &format!("{path}/{name}"), lines);
            }
        }
        // The elements of any other list have one shape. A worker's row has two, and the test makes their order fixed.
        Value::Array(list) if path == "/workers" => {
            for row in list {
                shape(row, &format!("{path}/{}", row["state"].as_str().expect("a state")), lines);
            }
        }
        Value::Array(list) => shape(&list[0], &format!("{path}/{}", list.len()), lines),
        Value::Null => writeln!(lines, "{path} null").expect("memory"),
        Value::Bool(_) => writeln!(lines, "{path} bool").expect("memory"),
        Value::Number(n) if n.is_u64() => writeln!(lines, "{path} count").expect("memory"),
        Value::Number(_) => writeln!(lines, "{path} seconds").expect("memory"),
        Value::String(_) => writeln!(lines, "{path} text").expect("memory"),
    }
}

#[test]
fn its_shape_is_the_documented_one() {
    let server = Millpond::start(&["--workers", "2", "--work", "1h"]);
    let mut client = server.connect();
    client.write_all(b"stuck").expect("sent");
    let status = eventually("one worker serves, one is idle", || {
        let status = status(&server);
        (rows(&status, "busy").len() == 1 && rows(&status, "busy")[0].get("peer").is_some()).then_some(status)
    });
    let mut found = String::new();
    shape(&status, "", &mut found);
    let mut lines: Vec<_> = found.lines().collect();
    lines.sort_unstable();
    let found = lines.join("\n") + "\n";
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/status.txt");
    if std::env::var_os("MILLPOND_WRITE_GOLDEN").is_some() {
        std::fs::write(golden, &found).expect("the golden file can be written");
    }
    assert_eq!(found, std::fs::read_to_string(golden).expect("the golden file"));
    // Every name but reasons, kinds and outcomes, which are the same as in the metrics.
    let readme = include_str!("../README.md");
    let paths =
        found.lines().filter_map(|line| line.split(' ').next()).filter(|path| !path.contains("_total/"));
    for name in paths.flat_map(|path| path.split('/')).filter(|name| name.parse::<u32>().is_err()) {
        let told = name.is_empty() || readme.contains(&format!("`{name}`"));
        assert!(told, "the README does not mention {name}");
    }
}

#[test]
fn a_busy_worker_says_whom_it_serves() {
    let server = Millpond::start(&["--workers", "2", "--work", "1h", "--max-connections", "9"]);
    let mut clients: Vec<TcpStream> = (0..5).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.write_all(b"stuck").expect("sent"));
    let first = eventually("two clients are served", || {
        let status = status(&server);
        let served = rows(&status, "busy").iter().filter(|row| row["turn_bytes"] == 5).count();
        let pool = (number(&status, "/pool/busy"), number(&status, "/pool/queue_depth"));
        (served == 2 && pool == (2.0, 3.0)).then_some(status)
    });
    assert_eq!(broken_law(&first), None);
    assert_eq!((number(&first, "/connections/active"), number(&first, "/connections/queued")), (2.0, 3.0));
    let ours: Vec<SocketAddr> = clients.iter().map(|client| client.local_addr().expect("bound")).collect();
    let busy = rows(&first, "busy");
    for row in &busy {
        let peer: SocketAddr = row["peer"].as_str().expect("a peer").parse().expect("an address");
        assert!(ours.contains(&peer), "{peer} is not one of {ours:?}");
        assert_eq!((number(row, "/jobs"), number(row, "/turn_bytes")), (1.0, 5.0));
    }
    assert_ne!(busy[0]["peer"], busy[1]["peer"]);
    let mut connections: Vec<u64> =
        busy.iter().map(|row| row["connection"].as_u64().expect("a number")).collect();
    connections.sort_unstable();
    assert!(
        connections[0] >= 1 && connections[1] <= 5 && connections[0] != connections[1],
        "{connections:?}"
    );
    // The second answer shows the same jobs by the same values, while time goes on.
    let second = status(&server);
    assert_eq!(rows(&second, "busy"), rows(&first, "busy"));
    assert!(number(&second, "/uptime_seconds") > number(&first, "/uptime_seconds"));
    assert!(
        number(&second, "/pool/queue_oldest_age_seconds") > number(&first, "/pool/queue_oldest_age_seconds")
    );
    assert!(number(&second, "/pool/busy_seconds_total") > number(&first, "/pool/busy_seconds_total"));
    assert_eq!((number(&first, "/limits/connections"), number(&first, "/limits/workers")), (9.0, 2.0));
    assert_eq!(second["limits"]["queue_wait_seconds"], Value::Null);
    assert_eq!(second["limits"]["overload"], "wait");
}

/// The reactor is one of the workers here, and has a row like the others.
#[test]
fn quiet_rows_add_up_to_the_scrape() {
    let server = Millpond::start(&["--workers", "3"]);
    let mut client = server.connect();
    for _ in 0..20 {
        ping(&mut client, b"around and around");
    }
    drop(client);
    server.scrape_after("the client has left", |now| now.closed("client") == 1.0);
    let status = eventually("all workers are idle", || {
        let status = status(&server);
        (number(&status, "/pool/busy") == 0.0 && rows(&status, "idle").len() == 3).then_some(status)
    });
    assert_eq!(broken_law(&status), None);
    let idle = rows(&status, "idle");
    assert_eq!(idle.len(), 3);
    let jobs: f64 = idle.iter().map(|row| number(row, "/jobs")).sum();
    assert_eq!(jobs, number(&status, "/pool/submitted_total"));
    for row in idle {
        assert_eq!(number(row, "/jobs") > 0.0, number(row, "/since_seconds") > 0.0, "{row}");
    }
    let scrape = server.scrape();
    for (path, series) in [
        ("/pool/submitted_total", "pool_submitted_total{pool=\"echo\"}"),
        ("/pool/jobs_total/completed", "pool_jobs_total{pool=\"echo\",outcome=\"completed\"}"),
        ("/connections/accepted_total", "connections_accepted_total"),
        ("/received_bytes_total", "received_bytes_total"),
        ("/sent_bytes_total", "sent_bytes_total"),
        ("/limits/connections", "connections_limit"),
        ("/echo_latency/sum_seconds", "echo_latency_seconds_sum"),
    ] {
        assert_eq!(number(&status, path), scrape.get(series), "{path}");
    }
    let counted = |path: &str| -> u64 {
        let counts = status.pointer(path).and_then(Value::as_array).expect("counts");
        assert_eq!(counts.len(), status["latency_bounds_seconds"].as_array().expect("bounds").len() + 1);
        counts.iter().filter_map(Value::as_u64).sum()
    };
    assert_eq!(counted("/echo_latency/counts"), 20);
    assert_eq!(counted("/pool/queue_wait/counts") as f64, scrape.pool("queue_wait_seconds_count"));
}

#[test]
fn it_adds_up_under_load_and_no_counter_falls() {
    let server = Millpond::start(&["--workers", "4"]);
    let load = Load { address: server.echo, clients: 8, bytes: 4_000_000, message: 1..=20_000, seed: 6 };
    let load = std::thread::spawn(move || load.run());
    let mut last: Option<Value> = None;
    let mut answers = 0;
    while !load.is_finished() || answers == 0 {
        let now = status(&server);
        assert_eq!(broken_law(&now), None);
        for row in rows(&now, "busy") {
            if let Some(peer) = row.get("peer") {
                let peer: SocketAddr = peer.as_str().expect("text").parse().expect("an address");
                assert!(peer.ip().is_loopback() && number(row, "/connection") <= 8.0, "{row}");
            }
        }
        if let Some(last) = &last {
            for path in
                ["/uptime_seconds", "/pool/busy_seconds_total", "/pool/submitted_total", "/sent_bytes_total"]
            {
                assert!(number(&now, path) >= number(last, path), "{path} fell");
            }
        }
        last = Some(now);
        answers += 1;
    }
    load.join().expect("no panic").expect("every byte");
}

#[test]
fn each_phase_says_when_it_ends() {
    let flags = ["--workers", "1", "--work", "1h", "--lame-duck", "5s", "--drain-timeout", "2s"];
    let mut server = Millpond::start(&flags);
    let mut client = server.connect();
    client.write_all(b"stuck").expect("sent");
    let before = eventually("the client is served", || {
        let status = status(&server);
        (number(&status, "/pool/busy") == 1.0).then_some(status)
    });
    assert_eq!((&before["phase"], &before["phase_until_seconds"]), (&"serving".into(), &Value::Null));
    assert_eq!(before["not_ready"], Value::Null);
    server.signal(Signal::TERM);
    let left = |phase: &str| {
        let status = eventually(phase, || Some(status(&server)).filter(|status| status["phase"] == phase));
        assert!(status["not_ready"].is_string());
        number(&status, "/phase_until_seconds") - number(&status, "/uptime_seconds")
    };
    let lame = left("lame_duck");
    assert!(lame > 0.0 && lame <= 5.0, "{lame}");
    let drain = left("draining");
    assert!(drain > -1.0 && drain <= 2.0, "{drain}");
    assert_eq!(server.wait().code(), Some(3));
}

#[test]
fn the_page_is_one_document_that_is_not_kept() {
    let server = Millpond::start(&["--workers", "2"]);
    let page = server.get("/");
    assert_eq!((page.code, page.header("Content-Type")), (200, Some("text/html; charset=utf-8")));
    assert_eq!(page.header("Cache-Control"), Some("no-store"));
    let policy = page.header("Content-Security-Policy").expect("a policy");
    assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"), "{policy}");
    assert!(page.body.starts_with("<!doctype html>") && page.body.trim_end().ends_with("</html>"));
    assert_eq!(http(server.metrics, "POST / HTTP/1.1\r\n\r\n").code, 405);
    assert_eq!(http(server.metrics, "PUT /status.json HTTP/1.1\r\n\r\n").code, 405);
    let scrape = server.scrape();
    assert_eq!(scrape.get("http_requests_total{code=\"200\",path=\"/\"}"), 1.0);
    assert_eq!(scrape.get("http_requests_total{code=\"405\",path=\"/status.json\"}"), 1.0);
}

/// An endpoint shows a server's page only when it is given a server.
#[test]
fn an_endpoint_without_a_server_has_no_page() {
    let any_port = ([127, 0, 0, 1], 0).into();
    let endpoint = Exposition::serve(prometheus::Registry::new(), any_port).expect("it starts");
    let mut client = TcpStream::connect(endpoint.local_addr()).expect("a connection");
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.0 404 "), "{answer}");
    assert!(answer.ends_with("there are /metrics\n"), "{answer}");
    endpoint.stop();
}
