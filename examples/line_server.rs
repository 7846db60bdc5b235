//! `cargo run --example line_server` serves a key-value store; talk to it with `nc 127.0.0.1 15001`.
//!
//! `set KEY VALUE` and `get KEY`, a line each. Ctrl-C drains it: what was asked is answered, and nobody is cut.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;

use millpond::{Next, Server, Service};

#[derive(Default)]
struct Store(Mutex<HashMap<String, String>>);

impl Service for Store {
    /// What has come of a line that is not yet complete.
    type Session = Vec<u8>;

    fn open(&self, _peer: SocketAddr) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&self, partial: &mut Vec<u8>, bytes: &mut Vec<u8>) -> Next {
        partial.append(bytes);
        while let Some(end) = partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = partial.drain(..=end).collect();
            bytes.extend(self.answer(String::from_utf8_lossy(&line).trim()).into_bytes());
            bytes.push(b'\n');
        }
        // Nobody may fill the memory with a line that never ends.
        if partial.len() > 4096 { Next::Close } else { Next::KeepOpen }
    }
}

impl Store {
    fn answer(&self, line: &str) -> String {
        let mut store = self.0.lock().expect("no holder panics");
        match line.splitn(3, ' ').collect::<Vec<_>>()[..] {
            ["set", key, value] => {
                store.insert(key.to_owned(), value.to_owned());
                "ok".to_owned()
            }
            ["get", key] => store.get(key).cloned().unwrap_or_else(|| "none".to_owned()),
            _ => "say `set KEY VALUE` or `get KEY`".to_owned(),
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:15001".to_owned());
    let server = Server::builder("lines").service(Store::default()).workers(8).bind(address.parse()?)?;
    let running = server.start()?;
    let handle = running.handle();
    ctrlc::set_handler(move || handle.drain())?;
    // Whoever reads it may send the signal.
    println!("a key-value store on {}", running.local_addr());
    println!("{}", running.wait().ok_or("the server failed")?);
    Ok(())
}
