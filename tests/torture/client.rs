//! A client of a round: one thread sends what its script says, another reads and checks every byte.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, mpsc};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};

use super::common::PATIENCE;
use super::plan::{Manner, Script};

/// A prime, so that no message size or buffer size is in step with the pattern.
pub(crate) const BLOCK: usize = 65_521;

/// Bytes read at a time: less than a block, so that a piece of the pattern is compared at once.
pub(crate) const PIECE_MAX: usize = 60 * 1024;

/// The pattern twice, so that every piece of its endless repetition stands in it whole.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = fastrand::Rng::with_seed(7);
    let block: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(BLOCK).collect();
    [block.as_slice(), block.as_slice()].concat()
});

/// A client that comes as the signal does may find the door shut so that nobody answers it.
const KNOCK: Duration = Duration::from_millis(400);

/// The receive buffer of a client that reads slowly: small, so that the server feels it soon.
const SLOW_BUFFER: usize = 32 * 1024;

/// A stack of a client's threads, which do next to nothing on it.
const STACK: usize = 64 * 1024;

/// Well below the 250 ms of silence after which a drain takes a client for idle.
const STALL: Duration = Duration::from_millis(100);

/// What the clients of a round know of it.
pub(crate) struct Stage {
    pub(crate) address: SocketAddr,
    pub(crate) start: Instant,
    /// Set just before the signal is sent.
    pub(crate) signalled: AtomicBool,
    /// Set when the server is gone. Sequentially consistent, as the one above: both are rare.
    pub(crate) over: AtomicBool,
}

/// What became of a client.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) manner: Manner,
    pub(crate) connected: bool,
    /// It was connected when the signal had not been sent.
    pub(crate) in_time: bool,
    /// Bytes that the kernel had taken before the signal was sent, and in all.
    pub(crate) sent_before: usize,
    pub(crate) sent: usize,
    pub(crate) received: usize,
    pub(crate) end: End,
    /// Whether the machine kept one of its threads from running for so long that the client was silent where its script
    /// was not.
    pub(crate) stalled: bool,
    /// When it was connected, when the last byte came, and when the end: for who looks into a round that failed.
    pub(crate) times: [Duration; 3],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It never was connected.
    NotConnected,
    /// The end of the server's side.
    Whole,
    /// A reset.
    Reset,
    /// Its own, with a reset or without having read.
    Own,
    /// Something that must not happen.
    Wrong(String),
}

/// How far the reader is, for the writer to wait for.
#[derive(Default)]
struct Heard {
    progress: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Heard {
    fn note(&self, received: usize, ended: bool) {
        *self.progress.lock().expect("no client panics") = (received, ended);
        self.changed.notify_all();
    }

    /// Blocks until so many bytes are back. `false` when they will not come.
    fn wait_for(&self, bytes: usize) -> bool {
        let progress = self.progress.lock().expect("no client panics");
        let waits = |(received, ended): &mut (usize, bool)| *received < bytes && !*ended;
        let (progress, _) =
            self.changed.wait_timeout_while(progress, PATIENCE, waits).expect("no client panics");
        progress.0 >= bytes
    }

    /// Blocks until this time has passed. `false` when the server's end has come before.
    fn pause(&self, time: Duration) -> bool {
        let progress = self.progress.lock().expect("no client panics");
        let (progress, _) =
            self.changed.wait_timeout_while(progress, time, |(_, ended)| !*ended).expect("no client panics");
        !progress.1
    }
}

/// Does what the script says, to the end of the server.
pub(crate) fn run(script: &Script, stage: &Stage) -> Outcome {
    let mut outcome = Outcome {
        manner: script.manner,
        connected: false,
        in_time: false,
        sent_before: 0,
        sent: 0,
        received: 0,
        end: End::NotConnected,
        stalled: false,
        times: [Duration::ZERO; 3],
    };
    let heard = &Heard::default();
    let mut held = None;
    // Whatever takes memory comes before the connection: a thread that waits for memory in the middle of a read has the
    // socket locked, and then the kernel takes nothing in for it, nor sends what it owes.
    let mut buffer = vec![1; script.manner.piece()];
    let (hand_over, taken) = mpsc::channel::<Arc<TcpStream>>();
    thread::scope(|scope| {
        let reader = spawn(scope, "reader", move || {
            let Ok(stream) = taken.recv() else { return (0, End::NotConnected, [Duration::ZERO; 2], false) };
            let mut last_byte = Duration::ZERO;
            let (received, end) = read(script, stage, &stream, &mut buffer, |received| {
                last_byte = stage.start.elapsed();
                heard.note(received, false);
            });
            heard.note(received, true);
            (received, end, [last_byte, stage.start.elapsed()], was_kept_waiting())
        });
        thread::sleep(script.connect_at.saturating_sub(stage.start.elapsed()));
        if let Ok(stream) = connect(script, stage) {
            outcome.connected = true;
            outcome.times[0] = stage.start.elapsed();
            outcome.in_time = !stage.signalled.load(Ordering::SeqCst);
            for timeout in [TcpStream::set_read_timeout, TcpStream::set_write_timeout] {
                timeout(&stream, Some(PATIENCE)).expect("a socket option");
            }
            let stream = Arc::new(stream);
            hand_over.send(Arc::clone(&stream)).expect("the reader waits for it");
            (outcome.sent_before, outcome.sent) = write(script, stage, &stream, heard);
            held = script.stays.then_some(stream);
        } else {
            drop(hand_over);
        }
        let (received, end, times, kept_waiting) = reader.join().expect("no client panics");
        (outcome.received, outcome.end) = (received, end);
        outcome.times[1..].copy_from_slice(&times);
        outcome.stalled = kept_waiting || was_kept_waiting();
    });
    while held.is_some() && !stage.over.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(5));
    }
    if outcome.received > outcome.sent {
        outcome.end = End::Wrong("more came back than was sent".to_owned());
    }
    outcome
}

fn connect(script: &Script, stage: &Stage) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    if matches!(script.manner, Manner::ReadsSlowly { .. }) {
        socket.set_recv_buffer_size(SLOW_BUFFER)?;
    }
    socket.connect_timeout(&stage.address.into(), KNOCK)?;
    Ok(socket.into())
}

/// Sends, and returns how much the kernel took before the signal and in all.
fn write(script: &Script, stage: &Stage, stream: &TcpStream, heard: &Heard) -> (usize, usize) {
    let (mut before, mut sent) = (0, 0);
    let mut send = |bytes: usize| -> io::Result<usize> {
        let until = sent + bytes;
        while sent < until {
            let start = (script.phase + sent) % BLOCK;
            let mut writer = stream;
            sent += writer.write(&PATTERN[start..start + BLOCK.min(until - sent)])?;
            if !stage.signalled.load(Ordering::SeqCst) {
                before = sent;
            }
        }
        Ok(sent)
    };
    let mut say_all = || -> io::Result<()> {
        for &message in &script.messages {
            match script.manner {
                Manner::Talks { pause } => {
                    let sent = send(message)?;
                    if !heard.wait_for(sent) || !heard.pause(pause) {
                        return Ok(());
                    }
                }
                Manner::Halts { pause } => {
                    send(message / 2)?;
                    if !heard.pause(pause) {
                        return Ok(());
                    }
                    send(message - message / 2)?;
                }
                _ => {
                    send(message)?;
                }
            }
        }
        if let Manner::ReadsSlowly { late: Some(late), .. } = script.manner {
            thread::sleep(late);
            send(1)?;
        }
        Ok(())
    };
    // A server that ends the conversation may do it in the middle of a message. What that means is judged by what has
    // come back.
    let said = say_all();
    match script.manner {
        Manner::HalfCloses | Manner::ComesLate => {
            let _ = stream.shutdown(Shutdown::Write);
        }
        Manner::Resets => {
            // The reader comes home, and the close after it is a reset.
            SockRef::from(stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
            let _ = stream.shutdown(Shutdown::Read);
        }
        Manner::Deaf => {}
        _ => {
            if script.leaves && said.is_ok() && heard.wait_for(sent) {
                let _ = stream.shutdown(Shutdown::Write);
            }
        }
    }
    (before, sent)
}

/// Reads to the end, tells how far it is, and returns how much came and how it ended.
fn read(
    script: &Script,
    stage: &Stage,
    stream: &TcpStream,
    buffer: &mut [u8],
    mut came: impl FnMut(usize),
) -> (usize, End) {
    if script.manner == Manner::Deaf {
        while !stage.over.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        return (0, End::Own);
    }
    let (first, pause) = match script.manner {
        Manner::ReadsSlowly { first, pause, .. } => (first, pause),
        _ => (Duration::ZERO, Duration::ZERO),
    };
    thread::sleep(first);
    let mut received = 0;
    loop {
        let mut reader = stream;
        let bytes = match reader.read(buffer) {
            Ok(0) if script.manner == Manner::Resets => return (received, End::Own),
            Ok(0) => return (received, End::Whole),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return (received, End::Reset),
            Err(error) => return (received, End::Wrong(format!("reading failed: {error}"))),
        };
        let start = (script.phase + received) % BLOCK;
        if buffer[..bytes] != PATTERN[start..start + bytes] {
            return (received, End::Wrong(format!("wrong bytes after {received}")));
        }
        received += bytes;
        came(received);
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
}

/// A thread with a stack so small that the C library keeps those of the threads before it for the next, and the kernel
/// need not be asked for memory.
pub(crate) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    run: impl FnOnce() -> T + Send + 'scope,
) -> ScopedJoinHandle<'scope, T> {
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(STACK);
    builder.spawn_scoped(scope, run).expect("a thread")
}

/// Whether this thread was ready to run and not run for [`STALL`] and more in all, by the kernel's count.
fn was_kept_waiting() -> bool {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("the kernel counts");
    // Time on a processor, time waited for one, and turns.
    let waited_ns = text.split_whitespace().nth(1).and_then(|ns| ns.parse().ok()).expect("a number");
    Duration::from_nanos(waited_ns) >= STALL
}
