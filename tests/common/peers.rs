//! Services that answer `millpond load` rightly or wrongly, and a run of it against them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::eventually;

/// A peer's record of its clients.
#[derive(Default)]
pub struct Seen {
    pub connections: AtomicU64,
    /// The number of connections that the peer has read to their end.
    pub ended: AtomicU64,
    pub bytes: AtomicU64,
    pub addresses: Mutex<Vec<SocketAddr>>,
}

/// A service on a thread of its own for each connection. It accepts until it is dropped.
pub struct Peer {
    pub address: SocketAddr,
    pub seen: Arc<Seen>,
    over: Arc<AtomicBool>,
}

impl Peer {
    /// `serve` gets each connection, and its number from 0.
    pub fn start(serve: impl Fn(TcpStream, u64, &Seen) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (seen, over) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
        let (serve, in_thread, until) = (Arc::new(serve), Arc::clone(&seen), Arc::clone(&over));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if until.load(Ordering::Relaxed) {
                    return;
                }
                let stream = stream.expect("a connection");
                in_thread.addresses.lock().expect("addresses").push(stream.peer_addr().expect("a peer"));
                let number = in_thread.connections.fetch_add(1, Ordering::Relaxed);
                let (serve, seen) = (Arc::clone(&serve), Arc::clone(&in_thread));
                thread::spawn(move || serve(stream, number, &seen));
            }
        });
        Peer { address, seen, over }
    }

    /// Passes each piece that it reads to `answer`, and sends back the changed piece. `answer` gets the connection's
    /// number, the offset of the piece, and the piece, which is empty at the end of the stream.
    pub fn answering(answer: impl Fn(u64, u64, &mut Vec<u8>) + Send + Sync + 'static) -> Self {
        Self::start(move |stream, number, seen| {
            echo(stream, seen, |offset, piece| answer(number, offset, piece));
        })
    }

    pub fn right() -> Self {
        Self::answering(|_, _, _| {})
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // One more connection, so that the thread sees the flag.
        let _ = TcpStream::connect(self.address);
    }
}

/// Passes each piece to `answer` and sends back the changed piece, until the end of the stream or an error.
pub fn echo(mut stream: TcpStream, seen: &Seen, mut answer: impl FnMut(u64, &mut Vec<u8>)) {
    let mut buffer = vec![0; 64 * 1024];
    let mut offset = 0;
    loop {
        let Ok(received) = stream.read(&mut buffer) else { return };
        let mut piece = buffer[..received].to_vec();
        seen.bytes.fetch_add(received as u64, Ordering::Relaxed);
        answer(offset, &mut piece);
        offset += received as u64;
        if stream.write_all(&piece).is_err() {
            return;
        }
        if received == 0 {
            seen.ended.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
}

/// The result of a run.
pub struct Ran {
    pub code: Option<i32>,
    pub json: Value,
}

impl Ran {
    pub fn number(&self, name: &str) -> u64 {
        self.json[name].as_u64().unwrap_or_else(|| panic!("no whole number {name} in {}", self.json))
    }

    pub fn float(&self, name: &str) -> f64 {
        self.json[name].as_f64().unwrap_or_else(|| panic!("no number {name} in {}", self.json))
    }

    pub fn failures(&self, kind: &str) -> u64 {
        self.json["errors_by_kind"][kind].as_u64().unwrap_or_else(|| panic!("no {kind} in {}", self.json))
    }

    pub fn mismatches(&self) -> &[Value] {
        self.json["mismatches"].as_array().expect("a list")
    }

    /// Asserts that the run failed, and in this way only.
    pub fn failed_by(&self, kind: &str) -> u64 {
        assert_eq!(self.code, Some(1), "{}", self.json);
        assert_eq!(self.failures(kind), self.number("errors"), "{}", self.json);
        assert!(self.number("errors") > 0, "{}", self.json);
        self.number("errors")
    }
}

pub fn load(address: SocketAddr, flags: &str) -> Ran {
    Run::start(address, flags).wait()
}

/// A run of `millpond load --json`. Killed when dropped.
pub struct Run(Option<Child>);

impl Run {
    pub fn start(address: SocketAddr, flags: &str) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_millpond"))
            .args(["load", &address.to_string(), "--json"])
            .args(flags.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Run(Some(child.expect("the program starts")))
    }

    pub fn signal(&self, signal: Signal) {
        let child = self.0.as_ref().expect("it runs");
        kill_process(Pid::from_child(child), signal).expect("the process is there");
    }

    pub fn has_exited(&mut self) -> bool {
        self.0.as_mut().expect("it runs").try_wait().expect("a child").is_some()
    }

    /// Waits for the end of the run. It prints nothing on standard error, because that is no terminal.
    pub fn wait(mut self) -> Ran {
        eventually("the load ends", || self.has_exited().then_some(()));
        let child = self.0.take().expect("it ran");
        let Output { status, stdout, stderr } = child.wait_with_output().expect("its output");
        assert_eq!(String::from_utf8_lossy(&stderr), "");
        Ran { code: status.code(), json: serde_json::from_slice(&stdout).unwrap_or(Value::Null) }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
