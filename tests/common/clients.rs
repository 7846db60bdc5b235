//! Many clients on one thread, each sending a pattern of its own and checking every byte that comes back.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use super::PATIENCE;

/// A prime, so that no message size or buffer size is in step with the pattern.
const BLOCK: usize = 65_521;

/// The task of the clients.
#[derive(Clone)]
pub struct Load {
    pub address: SocketAddr,
    pub clients: usize,
    /// Bytes each client sends, and expects back.
    pub bytes: usize,
    /// The sizes of messages, of which the next is sent when the last is back.
    pub message: RangeInclusive<usize>,
    pub seed: u64,
}

struct Client {
    stream: TcpStream,
    /// Where its pattern starts in the block.
    phase: usize,
    message_end: usize,
    sent: usize,
    received: usize,
    failure: Option<String>,
}

impl Load {
    /// Runs to the end. `Err` names each client that did not get all of its bytes.
    pub fn run(self) -> Result<(), String> {
        self.run_with(|_| {})
    }

    /// Runs to the end, and now and then passes to `watch` the number of bytes that the slowest client has back.
    pub fn run_with(self, mut watch: impl FnMut(usize)) -> Result<(), String> {
        let mut random = fastrand::Rng::with_seed(self.seed);
        let block: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(BLOCK).collect();
        // The block has the pattern twice, so that every piece of the endless repetition is in it whole.
        let block = [block.as_slice(), block.as_slice()].concat();
        let mut poll = Poll::new().expect("a poller");
        let mut clients: Vec<Client> = (0..self.clients)
            .map(|number| {
                let mut stream = TcpStream::connect(self.address).expect("a connection");
                let interest = Interest::READABLE | Interest::WRITABLE;
                poll.registry().register(&mut stream, Token(number), interest).expect("it can be watched");
                let message_end = random.usize(self.message.clone()).min(self.bytes);
                let phase = random.usize(..BLOCK);
                Client { stream, phase, message_end, sent: 0, received: 0, failure: None }
            })
            .collect();
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; 256 * 1024];
        let mut progress = Instant::now();
        loop {
            let slowest = clients.iter().map(|client| client.received).min().expect("clients");
            watch(slowest);
            if clients.iter().all(|client| client.failure.is_some() || client.received == self.bytes) {
                break;
            }
            poll.poll(&mut events, Some(Duration::from_millis(100))).expect("events");
            for event in &events {
                progress = Instant::now();
                let client = &mut clients[event.token().0];
                if let Err(error) = client.advance(&self, &block, &mut buffer, &mut random) {
                    let at = format!("{error} after {} of {} bytes", client.received, self.bytes);
                    client.failure = Some(at);
                }
            }
            if progress.elapsed() > PATIENCE {
                return Err(format!("no client has got anything for {PATIENCE:?}"));
            }
        }
        let failures: Vec<String> = clients.into_iter().filter_map(|client| client.failure).collect();
        if failures.is_empty() {
            return Ok(());
        }
        Err(format!(
            "{} of {} clients: {}",
            failures.len(),
            self.clients,
            failures[..failures.len().min(3)].join("; ")
        ))
    }
}

impl Client {
    /// Sends and receives until neither is possible.
    fn advance(
        &mut self,
        load: &Load,
        block: &[u8],
        buffer: &mut [u8],
        random: &mut fastrand::Rng,
    ) -> io::Result<()> {
        loop {
            let mut blocked = true;
            while self.sent < self.message_end {
                let start = (self.phase + self.sent) % BLOCK;
                let piece = &block[start..start + BLOCK.min(self.message_end - self.sent)];
                match self.stream.write(piece) {
                    Ok(sent) => self.sent += sent,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            match self.stream.read(buffer) {
                Ok(0) if self.received == load.bytes => return Ok(()),
                Ok(0) => return Err(io::Error::other("the end of the stream")),
                Ok(received) => {
                    blocked = false;
                    let mut checked = 0;
                    while checked < received {
                        let start = (self.phase + self.received + checked) % BLOCK;
                        let length = BLOCK.min(received - checked);
                        if buffer[checked..checked + length] != block[start..start + length] {
                            return Err(io::Error::other("bytes that were not sent"));
                        }
                        checked += length;
                    }
                    self.received += received;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.received == self.message_end {
                if self.message_end == load.bytes {
                    // All is back. The server closes its side when it sees the end of ours.
                    return self.stream.shutdown(Shutdown::Write).or(Ok(()));
                }
                self.message_end = (self.message_end + random.usize(load.message.clone())).min(load.bytes);
                blocked = false;
            }
            if blocked {
                return Ok(());
            }
        }
    }
}
