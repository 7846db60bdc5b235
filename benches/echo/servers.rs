//! Servers as child processes: started, measured from outside, and stopped by their process id.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take that ought to take a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server to compare, by how it is started.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    start: Start,
}

#[derive(Clone, Debug)]
enum Start {
    /// The program itself, with these flags.
    Millpond(Vec<String>),
    /// This benchmark, as the peer of this name.
    Peer(&'static str),
    /// A command of a shell, with `{port}` in it; the port is printed by it, or the one that was put in.
    Command(String),
}

impl Contender {
    pub(crate) fn millpond(name: &str, flags: &[&str]) -> Self {
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Contender { name: name.to_owned(), start: Start::Millpond(flags) }
    }

    pub(crate) fn peer(name: &'static str) -> Self {
        Contender { name: name.to_owned(), start: Start::Peer(name) }
    }

    pub(crate) fn command(name: &str, command: &str) -> Self {
        Contender { name: name.to_owned(), start: Start::Command(command.to_owned()) }
    }

    /// The classic recipe in Python.
    pub(crate) fn python() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/thread_pool.py");
        Contender::command("python", &format!("python3 {path} {{port}}"))
    }

    /// Starts it, and waits until it listens.
    pub(crate) fn start(&self) -> Server {
        let mut known = None;
        let mut command = match &self.start {
            Start::Millpond(flags) => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_millpond"));
                command.args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--quiet"]).args(flags);
                command
            }
            Start::Peer(name) => {
                let mut command = Command::new(std::env::current_exe().expect("this program"));
                command.args(["--serve", name]);
                command
            }
            Start::Command(line) => {
                let port = free_port();
                known = Some(SocketAddr::from(([127, 0, 0, 1], port)));
                let mut command = Command::new("sh");
                // `exec`, so that the process id is the server's.
                command.args(["-c", &format!("exec {}", line.replace("{port}", &port.to_string()))]);
                command
            }
        };
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().expect("it starts");
        let address = known.unwrap_or_else(|| {
            let stdout = child.stdout.take().expect("it is piped");
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            let address = lines.find_map(|line| line.split_once("echo on ")?.1.parse().ok());
            address.unwrap_or_else(|| panic!("{} does not say where it listens", self.name))
        });
        let server = Server { child, address };
        let start = Instant::now();
        while std::net::TcpStream::connect(address).is_err() {
            assert!(start.elapsed() < PATIENCE, "{} does not listen on {address}", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

/// A server that runs. It is killed when this is dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Server {
    /// The processor time it has used.
    pub(crate) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        let after_name = stat.rsplit_once(')').expect("a name").1;
        let field = |number: usize| -> u64 {
            // The state, the third field of all, is the first here.
            after_name
                .split_whitespace()
                .nth(number - 3)
                .and_then(|field| field.parse().ok())
                .expect("a number")
        };
        // User and system time, in hundredths of a second on every Linux.
        Duration::from_millis((field(14) + field(15)) * 10)
    }

    /// Its resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// Waits until it has about this many descriptors open.
    fn wait_for_descriptors(&self, count: usize, mut meanwhile: impl FnMut()) {
        let start = Instant::now();
        let path = format!("/proc/{}/fd", self.child.id());
        while std::fs::read_dir(&path).expect("it runs").count() < count {
            meanwhile();
            assert!(start.elapsed() < PATIENCE, "{count} connections were not accepted");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Silent connections, held by a process of their own. They are closed when this is dropped.
pub(crate) struct Silent(Child);

impl Silent {
    pub(crate) fn open(server: &Server, count: usize) -> Self {
        // One that says something each second keeps the run going; the rest is silent.
        let child = load(server.address)
            .args(["-c", "1", "--rate", "1", "--duration", "1h", "--idle", &count.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut silent = Silent(child.expect("it starts"));
        server.wait_for_descriptors(count, || {
            let ended = silent.0.try_wait().expect("it is a child");
            assert!(ended.is_none(), "silent connections cannot be held; are local ports free? {ended:?}");
        });
        silent
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The load generator, aimed at this address.
pub(crate) fn load(address: SocketAddr) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millpond"));
    command.args(["load", &address.to_string()]).stdin(Stdio::null());
    command
}
