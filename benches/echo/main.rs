//! Compares echo servers: `cargo bench --bench echo`.
//!
//! `-- --quick` takes less than two minutes and is less sure; `-- --rounds 9` takes more rounds; `-- --only idle` runs
//! the scenarios whose name has that word in it; `-- --curves` runs millpond alone over connections, workers and
//! sizes; `-- --peer name='command {port}'` adds a server of yours, which listens on the port of 127.0.0.1 it is
//! given; `-- --save DIR` writes `echo.json` and `echo.svg`, or `curves.json`, there.
//!
//! Each server is a process of its own, and so is the load, `millpond load` on one thread, which checks every byte.
//! In each round every server has its turn, in a new order, so that what the machine does meanwhile befalls them
//! all. A figure is the median over the rounds, and so is a ratio, which is taken within a round.

mod peers;
mod results;
mod servers;

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use self::results::{Measured, Table};
use self::servers::{Contender, Server, Silent, load};

/// What the clients do, and with which servers it is tried.
struct Scenario {
    name: String,
    connections: usize,
    size: &'static str,
    churn: bool,
    idle: usize,
    /// Millpond's flags.
    flags: Vec<&'static str>,
    /// The peers, beside millpond, that can do it at all.
    peers: &'static [&'static str],
}

const ALL: &[&str] = &["untimed", "tokio", "threads", "python"];
/// A connection costs the others a thread, and with thousands the machine has none left.
const WITHOUT_THREADS: &[&str] = &["untimed", "tokio"];

fn scenario(name: &str, connections: usize) -> Scenario {
    Scenario {
        name: name.to_owned(),
        connections,
        size: "512",
        churn: false,
        idle: 0,
        flags: vec![],
        peers: ALL,
    }
}

fn scenarios() -> Vec<Scenario> {
    vec![
        scenario("1 client", 1),
        scenario("50 clients", 50),
        // More than the recipe has workers: some of its clients are never answered.
        scenario("300 clients", 300),
        scenario("1,000 clients", 1_000),
        Scenario { size: "64KiB", ..scenario("50 clients, 64 KiB", 50) },
        Scenario { idle: 5_000, peers: WITHOUT_THREADS, ..scenario("50 clients, 5,000 idle", 50) },
        Scenario { idle: 15_000, peers: WITHOUT_THREADS, ..scenario("50 clients, 15,000 idle", 50) },
        Scenario { flags: vec!["--work", "1ms"], peers: &[], ..scenario("300 clients, --work 1ms", 300) },
        // The last: it leaves local ports that are not to be had for a minute.
        Scenario { churn: true, ..scenario("churn, 50 clients", 50) },
    ]
}

/// Millpond alone: cost against connections, workers and size.
fn curves() -> Vec<Scenario> {
    let alone = |name: String, connections| Scenario { name, peers: &[], ..scenario("", connections) };
    let mut curves = Vec::new();
    for open in [1, 10, 100, 1_000, 5_000, 15_000] {
        let active = open.min(50);
        curves.push(Scenario { idle: open - active, ..alone(format!("open connections: {open}"), active) });
    }
    for connections in [1, 10, 50, 100, 300, 1_000, 5_000] {
        curves.push(alone(format!("active connections: {connections}"), connections));
    }
    for workers in ["1", "2", "8", "32", "128", "500", "2000"] {
        let flags = vec!["--workers", workers];
        curves.push(Scenario { flags, ..alone(format!("workers: {workers}"), 50) });
    }
    for size in ["1", "64", "512", "4KiB", "32KiB", "64KiB", "256KiB", "1MiB"] {
        curves.push(Scenario { size, ..alone(format!("size: {size}"), 50) });
    }
    curves
}

impl Scenario {
    fn contenders(&self, chosen: &[Contender]) -> Vec<Contender> {
        let mut all = vec![Contender::millpond("millpond", &self.flags)];
        for name in self.peers {
            all.push(match *name {
                "python" => Contender::python(),
                other => Contender::peer(other),
            });
        }
        if !self.peers.is_empty() {
            all.extend_from_slice(chosen);
        }
        all
    }

    /// One turn of one server.
    fn measure(&self, server: &Server, duration: Duration) -> Measured {
        let seconds = format!("{}ms", duration.as_millis());
        let connections = self.connections.to_string();
        let mut command = load(server.address);
        command.args([
            "-c",
            &connections,
            "--size",
            self.size,
            "--duration",
            &seconds,
            "--threads",
            "1",
            "--json",
        ]);
        if self.churn {
            command.arg("--churn");
        }
        let before = server.cpu();
        let output = command.stderr(Stdio::null()).output().expect("the load starts");
        let cpu = server.cpu() - before;
        let report: Value = serde_json::from_slice(&output.stdout).expect("the load reports");
        let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("no {key} in {report}"));
        assert!(
            number("errors") == number("connections_never_answered") || self.churn,
            "{}: {report}",
            self.name
        );
        Measured {
            rate: number("messages_per_second"),
            p50_us: number("latency_p50_ns") / 1e3,
            p99_us: number("latency_p99_ns") / 1e3,
            cpu_us: cpu.as_secs_f64() * 1e6 / number("messages").max(1.0),
            resident_mib: server.resident() as f64 / (1024.0 * 1024.0),
            never_answered: number("connections_never_answered"),
        }
    }

    fn run(&self, chosen: &[Contender], rounds: usize, duration: Duration) -> Table {
        let contenders = self.contenders(chosen);
        let servers: Vec<Server> = contenders.iter().map(Contender::start).collect();
        let silent: Vec<Silent> =
            servers.iter().filter(|_| self.idle > 0).map(|server| Silent::open(server, self.idle)).collect();
        let mut table = Table::new(&self.name, contenders.iter().map(|contender| contender.name.clone()));
        let mut order: Vec<usize> = (0..servers.len()).collect();
        // Once to warm up, not counted.
        for server in &servers {
            self.measure(server, duration / 4);
        }
        for _ in 0..rounds {
            fastrand::shuffle(&mut order);
            for number in &order {
                table.add(*number, self.measure(&servers[*number], duration));
            }
        }
        drop(silent);
        table
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let values = |name: &'static str| {
        let followed = arguments.windows(2).filter(move |pair| pair[0] == name);
        followed.map(|pair| pair[1].clone()).collect::<Vec<_>>()
    };
    if let Some(peer) = values("--serve").pop() {
        return peers::serve(&peer);
    }
    millpond::raise_descriptor_limit().expect("as many files as may be");
    let quick = has("--quick");
    let default_rounds = if quick { 1 } else { 5 };
    let rounds =
        values("--rounds").pop().map_or(default_rounds, |text| text.parse().expect("a number of rounds"));
    let duration = Duration::from_millis(if quick { 1_000 } else { 2_000 });
    let only = values("--only").pop().unwrap_or_default();
    let chosen: Vec<Contender> = values("--peer")
        .iter()
        .map(|peer| peer.split_once('=').expect("--peer name='command {port}'"))
        .map(|(name, command)| Contender::command(name, command))
        .collect();
    let scenarios = if has("--curves") { curves() } else { scenarios() };
    let mut tables = Vec::new();
    for scenario in scenarios.iter().filter(|scenario| scenario.name.contains(&only)) {
        let table = scenario.run(&chosen, rounds, duration);
        println!("{table}");
        tables.push(table);
    }
    if let Some(folder) = values("--save").pop() {
        let name = if has("--curves") { "curves" } else { "echo" };
        results::save(std::path::Path::new(&folder), name, &tables, rounds, duration);
    }
}
