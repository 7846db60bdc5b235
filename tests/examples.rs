//! The examples do what the README says, started as their first line says.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::{PATIENCE, eventually};
use rustix::process::{Pid, Signal, kill_process};

/// Where cargo has put an example of this profile.
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

/// The README's block of output under the command that runs this example.
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
fn the_line_server_answers_and_drains_on_ctrl_c() {
    let mut server =
        example("line_server").arg("127.0.0.1:0").stdout(Stdio::piped()).spawn().expect("it runs");
    let mut lines = BufReader::new(server.stdout.take().expect("it is piped"));
    let mut first = String::new();
    lines.read_line(&mut first).expect("a line");
    let address = first.trim().strip_prefix("a key-value store on ").expect("its address");
    let mut client = TcpStream::connect(address).expect("it listens");
    client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    client.write_all(b"set tea oolong\nget tea\nget mi").expect("it reads");
    client.write_all(b"lk\n").expect("it reads");
    let mut answers = BufReader::new(client).lines();
    let three: Vec<_> = (0..3).map(|_| answers.next().expect("an answer").expect("text")).collect();
    assert_eq!(three, ["ok", "oolong", "none"]);
    let pid = i32::try_from(server.id()).expect("a process id");
    kill_process(Pid::from_raw(pid).expect("not 0"), Signal::INT).expect("it lives");
    let status = eventually("it drains", || server.try_wait().expect("our child"));
    let mut report = String::new();
    lines.read_to_string(&mut report).expect("text");
    assert!(status.success() && report.contains("1 closed idle, 0 failed, 0 cut"), "{status}: {report}");
}
