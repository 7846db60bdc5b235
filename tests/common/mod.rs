//! What the tests share: the program as a child process, its metrics, and clients that check every byte.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file is its own program and uses its own part of this"
)]

pub mod clients;
pub mod peers;
pub mod pieces;
pub mod pools;
pub mod proxy;
pub mod report;
pub mod scrape;
pub mod victim;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use socket2::{Domain, Socket, Type};

use scrape::Scrape;

/// Long enough for anything on a loaded machine; reached only when something is broken.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` returns a value, and fails with `what` after [`PATIENCE`].
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The kernel's states of this process's threads of this name: `S` is sleeping.
pub fn thread_states(name: &str) -> Vec<char> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("this process");
    let stats = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    // "pid (name) S ..."
    let of_this_name = stats.filter_map(|stat| {
        let (before, after) = stat.rsplit_once(')')?;
        let (_, comm) = before.split_once('(')?;
        if comm.starts_with(name) { after.trim_start().chars().next() } else { None }
    });
    of_this_name.collect()
}

/// `millpond` as a child process on free ports. Killed when dropped.
pub struct Millpond {
    child: Child,
    pub echo: SocketAddr,
    pub metrics: SocketAddr,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Millpond {
    /// Starts millpond with these flags, and waits until it prints its addresses.
    pub fn start(flags: &[&str]) -> Self {
        Self::start_with(flags, |_| {})
    }

    /// Like [`start`](Millpond::start), but the caller can change the command first.
    pub fn start_with(flags: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millpond"));
        command.args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]).args(flags);
        prepare(&mut command);
        Self::spawn(&mut command)
    }

    /// Starts a command that is millpond, or that executes it in the same process.
    pub fn spawn(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let nowhere = SocketAddr::from(([0; 4], 0));
        let mut server = Self::spawn_logged(command, nowhere, nowhere);
        let mut lines = BufReader::new(server.child.stdout.take().expect("a pipe")).lines();
        let mut address = |prefix: &str, suffix: &str| -> Option<SocketAddr> {
            let line = lines.next()?.ok()?;
            line.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok()
        };
        let echo = address("millpond: echo on ", "");
        let metrics = address("millpond: metrics on http://", "/metrics");
        let (Some(echo), Some(metrics)) = (echo, metrics) else {
            server.end();
            panic!("millpond did not print its addresses");
        };
        (server.echo, server.metrics) = (echo, metrics);
        server
    }

    /// Starts millpond as a service manager does: with a socket for the echo and one for the metrics, and these
    /// variables.
    pub fn activated(
        echo: impl Into<OwnedFd>,
        metrics: impl Into<OwnedFd>,
        variables: &[(&str, &str)],
    ) -> Self {
        let (echo, metrics) = (echo.into(), metrics.into());
        let address = |socket: &OwnedFd| {
            let bound = rustix::net::getsockname(socket).ok().and_then(|address| address.try_into().ok());
            bound.unwrap_or(SocketAddr::from(([0; 4], 0)))
        };
        let (echo_address, metrics_address) = (address(&echo), address(&metrics));
        // The standard streams are the only descriptors that std passes on. A shell puts them where they belong, and
        // the program that it executes keeps its process id.
        let script = "exec 3<&0 4>&1 </dev/null >/dev/null; LISTEN_PID=$$ LISTEN_FDS=2 exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_millpond")]).envs(variables.iter().copied());
        command.stdin(echo).stdout(metrics);
        Self::spawn_logged(&mut command, echo_address, metrics_address)
    }

    /// Starts a command whose log is kept.
    fn spawn_logged(command: &mut Command, echo: SocketAddr, metrics: SocketAddr) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = child.stderr.take().expect("a pipe");
        let reader = {
            let log = Arc::clone(&log);
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines() {
                    let Ok(line) = line else { break };
                    let mut log = log.lock().expect("the log");
                    log.push_str(&line);
                    log.push('\n');
                }
            })
        };
        Millpond { child, echo, metrics, log, reader: Some(reader) }
    }

    /// Ends it at once, and keeps its log.
    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the process is there");
    }

    /// Stops it with SIGSTOP, and waits until none of its threads runs. The signal takes effect when the kernel has
    /// scheduled the thread that takes it; until then the others go on.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let is_stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
        };
        eventually("it is stopped", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("the process");
            tasks.flatten().all(is_stopped).then_some(())
        });
    }

    /// Lowers or raises the soft limit on its open files while it runs.
    pub fn limit_files(&self, current: u64, maximum: u64) {
        let limit = Rlimit { current: Some(current), maximum: Some(maximum) };
        prlimit(Some(self.pid()), Resource::Nofile, limit).expect("the limit can be set");
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let status = eventually("millpond exits", || self.child.try_wait().expect("a child"));
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader of the log");
        }
        status
    }

    /// Sends SIGINT and waits for the exit code.
    pub fn drain(&mut self) -> Option<i32> {
        self.signal(Signal::INT);
        self.wait().code()
    }

    pub fn has_exited(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// The program's log so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("the log").clone()
    }

    /// A connected client whose reads and writes give up after [`PATIENCE`].
    pub fn connect(&self) -> TcpStream {
        connect(self.echo)
    }

    pub fn scrape(&self) -> Scrape {
        Scrape::of(self.metrics)
    }

    /// Waits until a scrape meets `condition` and all jobs have ended, and scrapes once more. See [`Scrape::after`].
    pub fn scrape_after(&self, what: &str, condition: impl Fn(&Scrape) -> bool) -> Scrape {
        Scrape::after(self.metrics, what, condition)
    }

    /// Asks the side HTTP endpoint, with its address as the `Host`.
    pub fn get(&self, path: &str) -> Response {
        http(self.metrics, format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.metrics))
    }

    /// A line of `/proc/<pid>/status`, as a number.
    pub fn status(&self, field: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(path).expect("the process is there");
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let value = line.expect("the field").split_whitespace().next().expect("a value");
        value.parse().expect("a number")
    }

    /// Resident memory in MiB.
    pub fn resident_mib(&self) -> u64 {
        self.status("VmRSS") / 1024
    }

    pub fn threads(&self) -> u64 {
        self.status("Threads")
    }

    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("the process is there").count()
    }

    /// Processor time it has used.
    pub fn cpu(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("the process");
        let fields: Vec<&str> = text.rsplit(')').next().expect("fields").split_whitespace().collect();
        let ticks: u64 =
            [fields[11], fields[12]].iter().map(|ticks| ticks.parse::<u64>().expect("ticks")).sum();
        // USER_HZ, which is 100 on every Linux that Rust supports.
        Duration::from_millis(ticks * 10)
    }

    /// The share of one processor that it uses, over two seconds.
    pub fn processor_share(&self) -> f64 {
        let (start, before) = (Instant::now(), self.cpu());
        thread::sleep(Duration::from_secs(2));
        (self.cpu() - before).as_secs_f64() / start.elapsed().as_secs_f64()
    }
}

impl Drop for Millpond {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            eprintln!("millpond's log:\n{}", self.log());
        }
    }
}

pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// The same, with a receive buffer of this size. It is set before the connection is made, so that the window is never larger:
/// to a window that has shrunk, Linux sends in the pace of its probes alone, which grow rare.
pub fn connect_with(receive_buffer: usize, address: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(receive_buffer).expect("a socket option");
    socket.connect(&address.into()).expect("it listens");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// Sends a message and expects it back.
pub fn ping(stream: &mut TcpStream, message: &[u8]) {
    stream.write_all(message).expect("it can be sent");
    let mut answer = vec![0; message.len()];
    stream.read_exact(&mut answer).expect("it comes back");
    assert_eq!(answer, message);
}

/// An answer of the side HTTP endpoint.
#[derive(Debug)]
pub struct Response {
    pub code: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

/// Sends bytes and reads the whole answer.
pub fn http(address: SocketAddr, request: impl AsRef<[u8]>) -> Response {
    try_http(address, request).expect("an HTTP answer")
}

/// Like [`http`], but returns an error if no answer comes.
pub fn try_http(address: SocketAddr, request: impl AsRef<[u8]>) -> std::io::Result<Response> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_ref())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let bad = || std::io::Error::other(format!("no HTTP answer: {text:?}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(bad)?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(bad)?;
    Ok(Response { code, head: head.to_owned(), body: body.to_owned() })
}
