//! The examples do what the README says, started as their first line says. The line server also keeps what it says of its
//! bounds.

mod common;
#[path = "../examples/line_server.rs"]
#[expect(dead_code, reason = "its `main` is for the program only")]
mod line_server;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use common::{connect, eventually};
use line_server::{Input, Store};
use millpond::{Next, Service};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use socket2::{Domain, Socket, Type};

const KIB: usize = 1024;

/// The program of an example, where cargo has put it for this profile. Its first line must say how to run it.
fn example(name: &str) -> Command {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_millpond"));
    let path = program.with_file_name("examples").join(name);
    assert!(path.exists(), "no {}: run `cargo build --examples` with this profile first", path.display());
    let source = std::fs::read_to_string(format!("{}/examples/{name}.rs", env!("CARGO_MANIFEST_DIR")));
    let first = source.expect("its source").lines().next().unwrap_or_default().to_owned();
    let command = format!("cargo run --example {name}`");
    assert!(first.replace("--release ", "").contains(&command), "its first line has no command: {first}");
    Command::new(path)
}

fn output(name: &str) -> String {
    let output = example(name).output().expect("it runs");
    assert!(output.status.success(), "{name}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// The output that the README shows under the command that runs this example.
fn promised(name: &str) -> Vec<String> {
    let readme = include_str!("../README.md");
    let lines = readme.lines().skip_while(|line| !line.ends_with(&format!("--example {name}")));
    let block = lines.skip_while(|line| *line != "```text").skip(1).take_while(|line| *line != "```");
    let block: Vec<_> = block.map(str::to_owned).collect();
    assert!(!block.is_empty(), "the README shows no output of {name}");
    block
}

/// Compares line by line; a port, which differs each time, is written as in the README.
fn assert_as_promised(name: &str) {
    let port = |line: &str| match line.split_once("127.0.0.1:") {
        Some((before, after)) => {
            format!("{before}PORT{}", after.trim_start_matches(|c: char| c.is_ascii_digit()))
        }
        None => line.to_owned(),
    };
    let printed: Vec<_> = output(name).lines().map(port).collect();
    let promised: Vec<_> = promised(name).iter().map(|line| port(line)).collect();
    assert_eq!(printed, promised);
}

#[test]
fn fetch_prints_what_the_readme_says() {
    assert_as_promised("fetch");
}

#[test]
fn batch_prints_what_the_readme_says() {
    assert_as_promised("batch");
}

#[test]
fn await_blocking_prints_what_the_readme_says() {
    assert_as_promised("await_blocking");
}

#[test]
fn crawler_prints_what_the_readme_says() {
    assert_as_promised("crawler");
}

/// The line server as a child process. Killed when dropped.
struct LineServer {
    child: Child,
    address: SocketAddr,
    output: Option<BufReader<std::process::ChildStdout>>,
}

impl LineServer {
    fn start() -> Self {
        let mut child =
            example("line_server").arg("127.0.0.1:0").stdout(Stdio::piped()).spawn().expect("it runs");
        let mut output = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut server = LineServer { child, address: SocketAddr::from(([0; 4], 0)), output: None };
        let mut first = String::new();
        output.read_line(&mut first).expect("a line");
        let address = first.trim().strip_prefix("a key-value store on ").expect("its address");
        server.address = address.parse().expect("an address");
        server.output = Some(output);
        server
    }

    /// Starts it with a standard output that nobody reads any more.
    fn start_unread() -> Self {
        // Bound, and not listening: no other program gets the port, and it refuses connections until the server listens.
        let reserved = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        reserved.set_reuse_address(true).expect("a socket option");
        reserved.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
        let address = reserved.local_addr().ok().and_then(|address| address.as_socket()).expect("an address");
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        let mut command = example("line_server");
        let child = command.arg(address.to_string()).stdout(writer).spawn().expect("it runs");
        let server = LineServer { child, address, output: None };
        eventually("it listens", || TcpStream::connect(address).ok());
        server
    }

    /// Sends SIGINT. Returns the exit status and what it has printed since it said where it listens.
    fn drain(mut self) -> (ExitStatus, String) {
        kill_process(Pid::from_child(&self.child), Signal::INT).expect("the process is there");
        let status = eventually("it drains", || self.child.try_wait().expect("a child"));
        let mut rest = String::new();
        if let Some(output) = &mut self.output {
            output.read_to_string(&mut rest).expect("text");
        }
        (status, rest)
    }

    /// Resident memory in MiB.
    fn resident_mib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(path).expect("the process is there");
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("the field");
        let kib: u64 = line.split_whitespace().next().expect("a value").parse().expect("a number");
        kib / 1024
    }
}

impl Drop for LineServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_line_server_answers_and_drains_on_ctrl_c() {
    let server = LineServer::start();
    let mut client = connect(server.address);
    client.write_all(b"set tea oolong\nget tea\nget mi").expect("it reads");
    client.write_all(b"lk\n").expect("it reads");
    let mut answers = BufReader::new(client).lines();
    let three: Vec<_> = (0..3).map(|_| answers.next().expect("an answer").expect("text")).collect();
    assert_eq!(three, ["ok", "oolong", "none"]);
    let (status, report) = server.drain();
    assert!(status.success() && report.contains("1 closed idle, 0 failed, 0 cut"), "{status}: {report}");
}

#[test]
fn a_closed_standard_output_does_not_stop_the_line_server() {
    let server = LineServer::start_unread();
    let mut client = connect(server.address);
    client.write_all(b"get tea\n").expect("it reads");
    client.read_exact(&mut [0; 5]).expect("an answer");
    drop(client);
    let (status, _) = server.drain();
    assert!(status.success(), "{status}");
}

/// Ten clients ask for 120 MB in all. The kernel's buffers take some of it.
#[test]
fn answers_that_nobody_reads_keep_the_line_servers_memory_bounded() {
    const CLIENTS: usize = 10;
    const GETS: usize = 3000;
    let server = LineServer::start();
    let value = "v".repeat(4000);
    let mut first = connect(server.address);
    first.write_all(format!("set k {value}\n").as_bytes()).expect("it reads");
    first.read_exact(&mut [0; 3]).expect("an answer");
    let before = server.resident_mib();
    let gets = "get k\n".repeat(GETS);
    let mut clients: Vec<TcpStream> = (0..CLIENTS).map(|_| connect(server.address)).collect();
    clients.iter_mut().for_each(|client| client.write_all(gets.as_bytes()).expect("the kernel takes it"));
    // All answers of one call to the service are in memory before the first of them is sent.
    for client in &clients {
        client.peek(&mut [0]).expect("an answer");
    }
    let kept = server.resident_mib().saturating_sub(before);
    assert!(kept < 10, "{kept} MiB for ten clients");
    // The rest of the answers comes as they are read.
    for client in clients {
        let mut answers = BufReader::new(client).lines();
        for number in 0..GETS {
            assert!(answers.next().expect("an answer").expect("text") == value, "answer {number}");
        }
    }
}

#[test]
fn a_line_that_is_too_long_ends_its_connection_with_an_error() {
    let server = LineServer::start();
    // With and without the end of the line.
    for end in ["\nget k\n", ""] {
        let mut client = connect(server.address);
        client.write_all(format!("set k v\n{}{end}", "x".repeat(4097)).as_bytes()).expect("it reads");
        let mut answers = String::new();
        client.read_to_string(&mut answers).expect("the end, and no reset");
        assert_eq!(answers, "ok\nerror: a line has at most 4096 bytes\n");
    }
}

/// Gives the line server's service each piece as if it was read from a connection. Returns all answers, and whether the
/// connection is closed.
fn converse(store: &Store, input: &mut Input, pieces: impl IntoIterator<Item = Vec<u8>>) -> (Vec<u8>, bool) {
    let mut answers = Vec::new();
    for mut bytes in pieces {
        loop {
            let next = store.serve(input, &mut bytes);
            assert!(bytes.len() <= 64 * KIB + 4097, "{} bytes in one call", bytes.len());
            answers.append(&mut bytes);
            match next {
                Next::More => {}
                Next::KeepOpen => break,
                Next::Close => return (answers, true),
            }
        }
    }
    (answers, false)
}

#[test]
fn the_line_server_answers_the_same_however_its_input_is_cut() {
    let mut input = b"set tea oolong\r\nget tea\n\nget\nget milk\nset k ".to_vec();
    input.extend([b'v'; 4090]);
    input.extend(b"\nget k\nset tea oolong and milk\nget tea\nhal");
    let mut expected = b"ok\noolong\n".to_vec();
    expected.extend(b"error: say `set KEY VALUE` or `get KEY`\n".repeat(2));
    expected.extend(b"none\nok\n");
    expected.extend([b'v'; 4090]);
    expected.extend(b"\nok\noolong and milk\n");
    for size in [1, 2, 3, 7, 100, 4096, 4097, input.len()] {
        let pieces = input.chunks(size).map(<[u8]>::to_vec);
        let (answers, closed) = converse(&Store::default(), &mut Input::default(), pieces);
        assert!(answers == expected && !closed, "in pieces of {size}: {}", String::from_utf8_lossy(&answers));
    }
}

#[test]
fn the_longest_line_is_answered_and_a_longer_one_is_not() {
    for (length, too_long) in [(4096, false), (4097, true)] {
        for end in ["", "\n"] {
            let line = format!("{}{end}", "x".repeat(length)).into_bytes();
            let (answers, closed) = converse(&Store::default(), &mut Input::default(), [line]);
            let complained = answers.starts_with(b"error: a line has at most");
            assert_eq!((complained, closed), (too_long, too_long), "{length} and {end:?}");
        }
    }
}

#[test]
fn a_full_store_takes_no_new_key() {
    let (store, mut input) = (Store::default(), Input::default());
    let mut ask = |line: String| converse(&store, &mut input, [line.into_bytes()]).0;
    for key in 0..10_000 {
        assert_eq!(ask(format!("set {key} first\n")), b"ok\n");
    }
    assert_eq!(ask("set one too many\n".to_owned()), b"error: the store is full\n");
    assert_eq!(ask("get one\n".to_owned()), b"none\n");
    assert_eq!(ask("set 7 second\n".to_owned()), b"ok\n");
    assert_eq!(ask("get 7\n".to_owned()), b"second\n");
}

/// Processor time of this thread, so that other programs do not count.
#[test]
fn the_line_servers_work_grows_with_its_input_and_no_faster() {
    let cost = |newlines: usize| {
        let time = || {
            let (store, mut input) = (Store::default(), Input::default());
            let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("a time");
            let start = now();
            let (answers, _) = converse(&store, &mut input, [vec![b'\n'; newlines]]);
            assert_eq!(answers.iter().filter(|byte| **byte == b'\n').count(), newlines);
            now() - start
        };
        time().min(time())
    };
    let (little, much) = (cost(16 * KIB), cost(512 * KIB));
    // 32 times in theory, and up to 1024 times if each line moved what stands behind it.
    assert!(much < 100 * little, "16 KiB took {little:?}, 512 KiB {much:?}");
}
