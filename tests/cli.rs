//! The command line: help, errors in flags, starts that fail, the log, and the standard streams.

mod common;

use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Output, Stdio};

use common::{Millpond, PATIENCE, eventually, ping};
use socket2::{Domain, Socket, Type};

fn run(args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_millpond"))
        .args(args)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("the program runs");
    (status.code(), String::from_utf8(stdout).expect("text"), String::from_utf8(stderr).expect("text"))
}

/// Asserts the exit code, and one line on standard error with all these parts. Standard output must be empty.
fn refused(args: &[&str], env: &[(&str, &str)], code: i32, parts: &[&str]) {
    let (found, stdout, stderr) = run(args, env);
    assert_eq!((found, stdout.as_str()), (Some(code), ""), "{args:?} {env:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("millpond: "), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "no {part:?} in {stderr}");
    }
}

#[test]
fn help_and_version_always_work() {
    for args in [["--help"].as_slice(), &["-h"], &["serve", "--help"]] {
        let (code, stdout, stderr) = run(args, &[]);
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        assert!(stdout.contains("--drain-timeout") && stdout.contains("MILLPOND_DRAIN_TIMEOUT"), "{stdout}");
    }
    let (code, stdout, _) = run(&["--version"], &[]);
    assert_eq!((code, stdout), (Some(0), format!("millpond {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn an_error_in_a_flag_prints_one_line_with_the_remedy() {
    refused(&["--workers", "0"], &[], 2, &["--workers", "1 to 10000", "'0'"]);
    refused(&["--wokers", "4"], &[], 2, &["--wokers", "--workers"]);
    refused(&["--idle-timeout", "soon"], &[], 2, &["--idle-timeout", "soon", "30s"]);
    refused(&["--listen", "localhost"], &[], 2, &["--listen", "127.0.0.1:15000"]);
    refused(&["--overload", "panic"], &[], 2, &["--overload", "wait", "reject"]);
    refused(&["--workers"], &[], 2, &["--workers"]);
    refused(&["fly"], &[], 2, &["fly"]);
    refused(&[], &[("MILLPOND_WORKERS", "many")], 2, &["--workers", "many"]);
}

#[test]
fn a_start_that_fails_prints_one_line_with_the_reason_and_the_remedy() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    refused(&["--listen", &address], &[], 1, &["--listen", &address, "in use", "another port"]);
    refused(&["--listen", "127.0.0.1:0", "--metrics", &address], &[], 1, &["--metrics", &address, "in use"]);
    refused(&["--listen", "203.0.113.7:0"], &[], 1, &["--listen", "an address of this machine"]);
    refused(
        &["--listen", "127.0.0.1:0", "--max-connections", "10000000"],
        &[],
        1,
        &["--max-connections", "10000000", "ulimit -n"],
    );
}

#[test]
fn too_few_descriptors_to_start_print_one_line_with_the_remedy() {
    let under = |files: u32| {
        let script = format!("ulimit -n {files}; exec \"$0\" --listen 127.0.0.1:0 --metrics 127.0.0.1:0");
        let mut command = Command::new("sh");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_millpond")]);
        command
    };
    for files in [40, 60] {
        let output = under(files).output().expect("a shell");
        let stderr = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains("--max-connections") && stderr.contains("ulimit -n"), "{stderr}");
    }
    // With a few more descriptors, it serves a few connections.
    let mut server = Millpond::spawn(&mut under(100));
    ping(&mut server.connect(), b"hello");
    assert_eq!(server.drain(), Some(0));
}

/// Starts the program under a shell limit that is too low. Returns the one line it prints before it exits with code 1.
fn refused_under(limit: &str, flags: &str) -> String {
    let script = format!("ulimit {limit}; exec \"$0\" --listen 127.0.0.1:0 --metrics 127.0.0.1:0 {flags}");
    let mut command = Command::new("sh");
    let output = command.args(["-c", &script, env!("CARGO_BIN_EXE_millpond")]).output().expect("a shell");
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

#[test]
fn a_thread_that_the_system_refuses_is_reported_in_one_line() {
    // One stack is larger than the limit on data, which the program does not check before it starts threads.
    let stderr = refused_under("-d 900000", "--stack-size 1GiB");
    for part in ["--workers", "--stack-size", "ulimit -u"] {
        assert!(stderr.contains(part), "no {part} in {stderr}");
    }
}

#[test]
fn a_memory_limit_that_is_too_low_is_reported_before_anything_starts() {
    let stderr = refused_under("-v 900000", "--stack-size 10MiB");
    for part in ["--workers", "--stack-size", "ulimit -v"] {
        assert!(stderr.contains(part), "no {part} in {stderr}");
    }
    assert!(stderr.contains("at most 8"), "a number that fits: {stderr}");
}

#[test]
fn a_variable_sets_a_flag_that_is_not_given() {
    let server = Millpond::start_with(&["--workers", "5"], |command| {
        command.env("MILLPOND_WORKERS", "9").env("MILLPOND_MAX_CONNECTIONS", "11");
    });
    assert_eq!(server.scrape().pool("workers"), 5.0);
    assert_eq!(server.scrape().get("connections_limit"), 11.0);
}

#[test]
fn serve_is_the_default_command() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millpond"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--workers", "2"]);
    let mut server = Millpond::spawn(&mut command);
    ping(&mut server.connect(), b"hello");
    assert_eq!(server.drain(), Some(0));
}

#[test]
fn the_log_can_be_json_or_quiet() {
    let mut server = Millpond::start(&["--log", "json"]);
    assert_eq!(server.drain(), Some(0));
    let log = server.log();
    assert!(log.lines().count() >= 3, "{log}");
    for line in log.lines() {
        assert!(
            line.starts_with('{') && line.ends_with('}') && line.contains("\"level\":\"INFO\""),
            "{line}"
        );
    }
    for (flag, variable) in
        [("-q", "MILLPOND_NONE"), ("-q", "MILLPOND_VERBOSE"), ("--log=text", "MILLPOND_QUIET")]
    {
        let mut server = Millpond::start_with(&[flag], |command| {
            command.env(variable, "1");
        });
        assert_eq!(server.drain(), Some(0));
        assert_eq!(server.log(), "", "{flag} {variable}");
    }
    let mut server = Millpond::start_with(&["-v"], |command| {
        command.env("MILLPOND_QUIET", "yes");
    });
    ping(&mut server.connect(), b"hello");
    assert_eq!(server.drain(), Some(0));
    assert!(server.log().contains("DEBUG accepted"), "{}", server.log());
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let mut command = Command::new("sh");
    // The fifo is open for reading and never read, so it fills up. With -v each connection logs two lines.
    let script = "exec 3<>\"$FIFO\"; exec \"$0\" -v --listen 127.0.0.1:0 --metrics 127.0.0.1:0 2>&3";
    let fifo = std::env::temp_dir().join(format!("millpond-test-{}.fifo", std::process::id()));
    // The file is left over if this test failed in an earlier process with the same id.
    let _ = std::fs::remove_file(&fifo);
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    command.args(["-c", script, env!("CARGO_BIN_EXE_millpond")]).env("FIFO", &fifo);
    let mut server = Millpond::spawn(&mut command);
    for _ in 0..1500 {
        ping(&mut server.connect(), b"hello");
    }
    eventually("all closed", || (server.scrape().closed("client") == 1500.0).then_some(()));
    assert_eq!(server.drain(), Some(0));
    std::fs::remove_file(fifo).expect("the fifo is there");
}

/// Without a handler for SIGXFSZ, the first write beyond the limit kills the program.
#[test]
fn a_log_at_its_limit_of_size_stops_nothing() {
    let log = std::env::temp_dir().join(format!("millpond-test-{}.log", std::process::id()));
    // The limit is less than 64 KiB in every shell, and -v logs more than 150 bytes for each connection.
    let script = "ulimit -f 32; exec \"$0\" -v --listen 127.0.0.1:0 --metrics 127.0.0.1:0 2>\"$LOG\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_millpond")]).env("LOG", &log);
    let mut server = Millpond::spawn(&mut command);
    for _ in 0..500 {
        ping(&mut server.connect(), b"hello");
    }
    eventually("all closed", || (server.scrape().closed("client") == 500.0).then_some(()));
    let code = server.drain();
    let written = std::fs::read_to_string(&log).expect("the log");
    std::fs::remove_file(&log).expect("the log is there");
    assert_eq!(code, Some(0));
    assert!(written.contains("serving") && !written.contains("drained"), "the limit came first: {written}");
    assert!([32 * 512, 32 * 1024].contains(&written.len()), "{} bytes", written.len());
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let server = Millpond::start(&[]);
    let limited = std::env::temp_dir().join(format!("millpond-test-{}.out", std::process::id()));
    let load = format!("load {} --count 10", server.echo);
    let health = format!("health {} --ready", server.echo);
    for (command, redirection, line) in [
        ("--help", ">\"$OUT\"", "standard output cannot be written: File too large"),
        (&load, ">\"$OUT\"", "the report cannot be written to standard output: File too large"),
        ("--help", ">/dev/full", "standard output cannot be written: No space left"),
        (&load, ">/dev/full", "the report cannot be written to standard output: No space left"),
        // `health` prints its one line on standard error, so only the exit code is left.
        (&health, "2>\"$OUT\"", ""),
    ] {
        let script = format!("ulimit -f 0; exec \"$0\" {command} {redirection}");
        let output = Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_millpond")])
            .env("OUT", &limited)
            .output()
            .expect("a shell");
        let stderr = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{script}: {:?} {stderr}", output.status);
        assert!(stderr.contains(line) && stderr.lines().count() <= 1, "{script}: {stderr}");
    }
    std::fs::remove_file(&limited).expect("the shell made it");
    // A reader that has gone away is no error.
    let script = "\"$0\" --help | true; test \"$(\"$0\" --help | wc -l)\" -gt 50";
    let status = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_millpond")]).status();
    assert!(status.expect("a shell").success());
}

#[test]
fn closed_standard_streams_stop_nothing() {
    // This socket is bound and does not listen. So no other process gets the port, and it refuses connections until the
    // program listens on it.
    let reserved = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    reserved.set_reuse_address(true).expect("a socket option");
    reserved.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    let port = reserved.local_addr().ok().and_then(|address| address.as_socket()).expect("an address");
    let script = format!("exec \"$0\" --listen {port} --metrics 127.0.0.1:0 <&- >&- 2>&-");
    let mut child =
        Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_millpond")]).spawn().expect("a shell");
    let mut client = eventually("it listens", || std::net::TcpStream::connect(port).ok());
    client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    ping(&mut client, b"hello");
    drop(client);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .expect("the process is there");
    let status = eventually("the program exits", || child.try_wait().expect("a child"));
    assert_eq!(status.code(), Some(0));
}
