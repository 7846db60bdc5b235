//! Clients of one echo server, cut, paused and ended in any way. See `tests/common/pieces.rs`.
#![no_main]

#[path = "../../tests/common/pieces.rs"]
mod pieces;

use std::sync::Mutex;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use millpond::Echo;
use pieces::{Client, Echoes, Piece};

/// One for all inputs.
static SERVER: Mutex<Option<Echoes>> = Mutex::new(None);

/// What one client does: writes, reads, whether its buffers are narrow, and after how many bytes it resets.
type Input = (Vec<(u16, u8)>, Vec<(u16, u8)>, bool, Option<u16>);

/// The most bytes that are read at a time are at least these: with a pause before each of half a million, one input would take
/// minutes.
const LEAST_READ: usize = 512;

/// One in sixteen is long enough to fill buffers. Pauses are short, or there would be few inputs.
fn pieces(pieces: Vec<(u16, u8)>, least: usize) -> Vec<Piece> {
    let piece = |(bytes, pause): (u16, u8)| Piece {
        bytes: usize::from(bytes >> 4) * if bytes % 16 == 0 { 16 } else { 1 } + least,
        pause: Duration::from_micros(if pause > 240 { u64::from(pause) } else { 0 }),
    };
    pieces.into_iter().take(8).map(piece).collect()
}

fuzz_target!(|clients: Vec<Input>| {
    let clients: Vec<Client> = clients
        .into_iter()
        .take(3)
        .zip(1..)
        .map(|((writes, reads, narrow, reset_after), salt)| Client {
            salt,
            writes: pieces(writes, 1),
            // Whoever does not say how, reads all there is.
            reads: pieces(if reads.is_empty() { vec![(u16::MAX - 15, 0)] } else { reads }, LEAST_READ),
            narrow,
            reset_after: reset_after.map(|bytes| usize::from(bytes) + 1),
        })
        .collect();
    let mut server = SERVER.lock().expect("no input failed");
    server.get_or_insert_with(|| Echoes::start(Echo)).check(&clients);
});
