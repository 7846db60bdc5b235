//! `cargo run --example line_server` serves a key-value store; talk to it with `nc 127.0.0.1 15001`.
//!
//! `set KEY VALUE` and `get KEY`, a line each. On Ctrl-C it drains: it answers what clients have asked, then closes.
//!
//! Whatever clients send, its memory is bounded, and so is its work for each byte in and out:
//! - A line has a longest length. A connection that waits keeps the beginning of one line.
//! - One call to the service makes a bounded length of answers, then asks to be called again ([`Next::More`]). So a
//!   client that asks for much and reads nothing waits, with the rest of its lines unanswered.
//! - The store has a greatest number of keys.

use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Mutex;

use millpond::{Next, Server, Service};

/// The longest line in bytes, without its end.
const MAX_LINE: usize = 4096;

/// A call returns when its answers have this many bytes, or one answer more.
const MAX_ANSWERS: usize = 64 * 1024;

/// With the longest line, this bounds the store to 40 MB.
const MAX_KEYS: usize = 10_000;

#[derive(Default)]
pub(crate) struct Store(Mutex<HashMap<Vec<u8>, Vec<u8>>>);

/// Bytes that a client sent and that are not all answered yet.
#[derive(Default)]
pub(crate) struct Input {
    bytes: Vec<u8>,
    /// How many of `bytes` are answered.
    answered: usize,
    /// In how many of `bytes` the end of a line was searched for, so that none is searched twice.
    searched: usize,
}

struct TooLong;

impl Service for Store {
    type Session = Input;

    fn open(&self, _peer: SocketAddr) -> Input {
        Input::default()
    }

    fn serve(&self, input: &mut Input, bytes: &mut Vec<u8>) -> Next {
        input.bytes.append(bytes);
        while bytes.len() < MAX_ANSWERS {
            match input.next_line() {
                Some(Ok(line)) => self.answer(line, bytes),
                Some(Err(TooLong)) => {
                    bytes.extend(format!("error: a line has at most {MAX_LINE} bytes\n").into_bytes());
                    return Next::Close;
                }
                None => {
                    input.forget_answered();
                    return Next::KeepOpen;
                }
            }
        }
        Next::More
    }
}

impl Input {
    /// Takes the next complete line, without its end. `None` if there is none yet.
    fn next_line(&mut self) -> Option<Result<&[u8], TooLong>> {
        let found = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
        let end = found.map_or(self.bytes.len(), |distance| self.searched + distance);
        self.searched = end;
        if end - self.answered > MAX_LINE {
            return Some(Err(TooLong));
        }
        found?;
        let line = self.answered..end;
        self.answered = end + 1;
        self.searched = end + 1;
        Some(Ok(&self.bytes[line]))
    }

    /// Moves the unanswered bytes to the front and frees the rest. To do so for each line would take quadratic time.
    fn forget_answered(&mut self) {
        self.bytes.drain(..self.answered);
        self.bytes.shrink_to_fit();
        self.searched -= self.answered;
        self.answered = 0;
    }
}

impl Store {
    fn answer(&self, line: &[u8], answers: &mut Vec<u8>) {
        let mut words = line.trim_ascii().splitn(3, |byte| *byte == b' ');
        let mut store = self.0.lock().expect("no holder panics");
        let answer: &[u8] = match (words.next(), words.next(), words.next()) {
            (Some(b"set"), Some(key), Some(value)) if store.len() < MAX_KEYS || store.contains_key(key) => {
                store.insert(key.to_owned(), value.to_owned());
                b"ok"
            }
            (Some(b"set"), Some(_), Some(_)) => b"error: the store is full",
            (Some(b"get"), Some(key), None) => store.get(key).map_or(b"none", Vec::as_slice),
            _ => b"error: say `set KEY VALUE` or `get KEY`",
        };
        answers.extend_from_slice(answer);
        answers.push(b'\n');
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:15001".to_owned());
    let server = Server::builder("lines").service(Store::default()).workers(8).bind(address.parse()?)?;
    let running = server.start()?;
    let handle = running.handle();
    // Before it says where it listens, because a reader of that line may send the signal.
    ctrlc::set_handler(move || handle.drain())?;
    say(format_args!("a key-value store on {}", running.local_addr()));
    let report = running.wait().ok_or("the server failed")?;
    say(report);
    Ok(())
}

/// Prints a line. A closed standard output stops nothing: `println!` would panic.
fn say(what: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{what}");
}
