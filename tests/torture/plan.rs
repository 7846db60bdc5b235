//! What happens in a round: everything is drawn from its seed beforehand, so that a round can be had again.

use std::ops::RangeInclusive;
use std::time::Duration;

use fastrand::Rng;

use super::client::{BLOCK, PIECE_MAX};

/// Clients of a round.
const CLIENTS: RangeInclusive<usize> = 1..=24;

/// The most bytes that one client sends.
const BYTES_MAX: usize = 2 * 1024 * 1024;

/// The same for one that reads slowly: some of them send more than the buffers of both sockets hold, so that the server
/// has to keep the rest.
const SLOW_BYTES_MAX: usize = 6 * 1024 * 1024;

/// The server's settings and what its clients do.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) server: Settings,
    pub(crate) clients: Vec<Script>,
    /// From the start of the clients to the signal.
    pub(crate) signal_at: Duration,
    /// Which of the three signals it is.
    pub(crate) signal: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) workers: usize,
    pub(crate) work: Duration,
    pub(crate) max_connections: Option<usize>,
    pub(crate) max_queue_wait: Option<Duration>,
    /// Whether newcomers without a place are refused.
    pub(crate) reject: bool,
    pub(crate) idle_timeout: Duration,
    pub(crate) write_timeout: Duration,
    pub(crate) lame_duck: Duration,
    pub(crate) drain_timeout: Duration,
}

/// What one client does.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) manner: Manner,
    /// From the start of the round to its connecting.
    pub(crate) connect_at: Duration,
    pub(crate) messages: Vec<usize>,
    /// Where its bytes begin in the endless pattern.
    pub(crate) phase: usize,
    /// Whether it ends its side when it has said everything and heard the answers. Otherwise it waits for the server to.
    pub(crate) leaves: bool,
    /// Whether it keeps its socket after the server's end, until the server is gone.
    pub(crate) stays: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Sends nothing.
    Silent,
    /// Sends a message when the last is back, after a pause.
    Talks { pause: Duration },
    /// Stops in the middle of each message for a while.
    Halts { pause: Duration },
    /// Sends all without waiting for an answer.
    Pipelines,
    /// Sends more than the kernel's buffers hold, reads nothing at first and then little at a time, and has one more
    /// word to say, whatever the server does meanwhile, if it has the time.
    ReadsSlowly { first: Duration, piece: usize, pause: Duration, late: Option<Duration> },
    /// Sends all, ends its side, and reads to the end.
    HalfCloses,
    /// The same, and connects as the signal comes.
    ComesLate,
    /// Sends all and reads nothing.
    Deaf,
    /// Breaks off with a reset when it has sent all.
    Resets,
}

impl Manner {
    /// Whether it may itself be the reason that bytes are lost.
    pub(crate) fn loses(self) -> bool {
        matches!(self, Manner::Deaf | Manner::Resets)
    }

    /// Bytes it reads at a time.
    pub(crate) fn piece(self) -> usize {
        match self {
            Manner::ReadsSlowly { piece, .. } => piece,
            _ => PIECE_MAX,
        }
    }
}

impl Plan {
    pub(crate) fn draw(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let random = &mut random;
        let signal_at = ms(random, 0..=200);
        // In most rounds no client loses bytes by its own doing, so that more can be promised.
        let lossy = random.u8(..100) < 30;
        let most = pick(random, &[(30, 64), (40, 16 * 1024), (20, 256 * 1024), (10, BYTES_MAX)]);
        let clients: Vec<Script> =
            (0..random.usize(CLIENTS)).map(|_| Script::draw(random, signal_at, lossy, most)).collect();
        let limited = random.u8(..100) < 25;
        let write_timeout =
            if lossy && random.bool() { ms(random, 50..=200) } else { Duration::from_secs(30) };
        let server = Settings {
            workers: random.usize(1..=8),
            work: if random.u8(..100) < 25 { ms(random, 1..=4) } else { Duration::ZERO },
            max_connections: limited.then(|| random.usize(1..=clients.len())),
            max_queue_wait: (random.u8(..100) < 10).then(|| ms(random, 1..=10)),
            reject: random.bool(),
            idle_timeout: if random.u8(..100) < 10 { ms(random, 50..=300) } else { Duration::from_secs(300) },
            write_timeout,
            lame_duck: if random.u8(..100) < 60 { Duration::ZERO } else { ms(random, 1..=150) },
            drain_timeout: match random.u8(..100) {
                ..5 => Duration::ZERO,
                5..35 => ms(random, 10..=300),
                35..60 => ms(random, 300..=900),
                // A deaf client holds up the whole of it.
                _ if lossy && write_timeout > Duration::from_secs(1) => Duration::from_secs(1),
                _ => Duration::from_secs(20),
            },
        };
        Plan { server, clients, signal_at, signal: random.usize(..3) }
    }

    /// Whether the clients, or a timeout before the drain, may lose bytes that were read.
    pub(crate) fn is_lossy(&self) -> bool {
        self.clients.iter().any(|script| script.manner.loses())
            || self.server.write_timeout < Duration::from_secs(1)
    }

    /// Whether newcomers may be refused.
    pub(crate) fn refuses(&self) -> bool {
        self.server.reject && (self.server.max_connections.is_some() || self.server.max_queue_wait.is_some())
    }
}

impl Script {
    fn draw(random: &mut Rng, signal_at: Duration, lossy: bool, most: usize) -> Self {
        let manner = match random.u8(..if lossy { 100 } else { 85 }) {
            ..10 => Manner::Silent,
            10..30 => Manner::Talks { pause: ms(random, 0..=20) },
            30..40 => Manner::Halts { pause: ms(random, 1..=320) },
            40..55 => Manner::Pipelines,
            55..65 => Manner::ReadsSlowly {
                first: ms(random, 0..=600),
                piece: random.usize(16 * 1024..=PIECE_MAX),
                pause: ms(random, 0..=6),
                // Before the server has lingered on it for a second.
                late: Some(ms(random, 1..=700)),
            },
            65..75 => Manner::HalfCloses,
            75..85 => Manner::ComesLate,
            85..92 => Manner::Deaf,
            _ => Manner::Resets,
        };
        let connect_at = if manner == Manner::ComesLate {
            let around = signal_at + Duration::from_micros(random.u64(..=4000));
            around.saturating_sub(Duration::from_millis(2))
        } else {
            Duration::from_secs_f64(signal_at.as_secs_f64() * random.f64())
        };
        let mut messages = Vec::new();
        let slow = matches!(manner, Manner::ReadsSlowly { .. });
        let (most, mut left) = if slow { (SLOW_BYTES_MAX / 8, SLOW_BYTES_MAX) } else { (most, BYTES_MAX) };
        for _ in 0..random.usize(1..=if matches!(manner, Manner::Halts { .. }) { 3 } else { 40 }) {
            let size = random.usize(1..=most).min(left);
            if size > 0 {
                messages.push(size);
            }
            left -= size;
        }
        if manner == Manner::Silent {
            messages.clear();
        }
        // The least that no kernel's buffers hold.
        if manner == Manner::Deaf && random.bool() {
            messages = vec![16 * 1024 * 1024];
        }
        Script {
            manner,
            connect_at,
            messages,
            phase: random.usize(..BLOCK),
            leaves: random.u8(..100) < 40,
            stays: random.u8(..100) < 5,
        }
    }
}

fn ms(random: &mut Rng, range: RangeInclusive<u64>) -> Duration {
    Duration::from_millis(random.u64(range))
}

/// One of the values, as likely as its share in a hundred.
fn pick(random: &mut Rng, values: &[(u8, usize)]) -> usize {
    let mut at = random.u8(..100);
    for (share, value) in values {
        match at.checked_sub(*share) {
            Some(rest) => at = rest,
            None => return *value,
        }
    }
    unreachable!("the shares add up to a hundred")
}
