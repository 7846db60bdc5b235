//! The bytes that were sent on one connection, and whether the same bytes come back.
//!
//! It knows nothing of sockets. It returns the next bytes to send, and takes the bytes that came in. A byte is expected
//! only once it was sent. So a byte that comes early, twice, or after the last answer is always seen.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use super::pattern::{CERTAIN, OFFSET_END, Pattern};
use super::report::{Mismatch, Origin};

/// Bytes of a mismatch that are shown.
const BYTES_SHOWN: usize = 8;

/// Connections among which the origin of foreign bytes is looked for. They are the last ones opened, and the search
/// takes some milliseconds.
const CONNECTIONS_SEARCHED: u64 = 65_536;

/// A message that was begun and is not back yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// The offset after its last byte.
    end: u64,
    pub(super) bytes: u64,
    /// When it was sent, or due.
    pub(super) since_ns: u64,
}

/// One connection's conversation.
#[derive(Debug)]
pub(super) struct Talk {
    pub(super) number: u64,
    seed: u64,
    pattern: Pattern,
    /// Oldest first. Its memory is kept from one connection to the next.
    waiting: VecDeque<Asked>,
    /// Messages begun, and their bytes.
    pub(super) asked: u64,
    asked_bytes: u64,
    /// Of these bytes, those that the kernel has taken, and those that came back.
    sent: u64,
    received: u64,
    /// Messages that came back whole.
    pub(super) answered: u64,
}

impl Talk {
    /// Has room for `pipeline` messages, which is as many as may be on their way.
    pub(super) fn new(seed: u64, pipeline: usize) -> Self {
        Talk {
            number: 0,
            seed,
            pattern: Pattern::of(seed, 0),
            waiting: VecDeque::with_capacity(pipeline),
            asked: 0,
            asked_bytes: 0,
            sent: 0,
            received: 0,
            answered: 0,
        }
    }

    /// Starts again, as the connection of this number.
    pub(super) fn begin(&mut self, number: u64) {
        self.number = number;
        self.pattern = Pattern::of(self.seed, number);
        self.waiting.clear();
        (self.asked, self.asked_bytes, self.sent, self.received, self.answered) = (0, 0, 0, 0, 0);
    }

    /// Begins a message. Its size depends only on the seed, the connection and the number of messages before it.
    pub(super) fn ask(&mut self, sizes: &RangeInclusive<u64>, since_ns: u64) {
        let span = sizes.end() - sizes.start() + 1;
        let bytes = if span == 1 { 0 } else { self.pattern.draw(self.asked) % span } + sizes.start();
        self.asked += 1;
        self.asked_bytes += bytes;
        self.waiting.push_back(Asked { end: self.asked_bytes, bytes, since_ns });
    }

    /// The messages on their way.
    pub(super) fn waiting(&self) -> &VecDeque<Asked> {
        &self.waiting
    }

    /// Whether there are bytes to send.
    pub(super) fn owes(&self) -> bool {
        self.sent < self.asked_bytes
    }

    /// Fills the front of `buffer` with the next bytes to send, and returns them.
    pub(super) fn outgoing<'a>(&self, buffer: &'a mut [u8]) -> &'a [u8] {
        let left = usize::try_from(self.asked_bytes - self.sent).unwrap_or(usize::MAX);
        let length = left.min(buffer.len());
        let piece = &mut buffer[..length];
        self.pattern.write(self.sent, piece);
        piece
    }

    /// Notes that the kernel took this many of the outgoing bytes.
    pub(super) fn took(&mut self, bytes: usize) {
        self.sent += bytes as u64;
        debug_assert!(self.sent <= self.asked_bytes, "nothing is sent that was not asked");
    }

    /// Takes bytes that came in. Calls `answer` for each message that they complete.
    pub(super) fn hear(&mut self, got: &[u8], mut answer: impl FnMut(Asked)) -> Result<(), Unexpected> {
        let expected = usize::try_from(self.sent - self.received).unwrap_or(usize::MAX).min(got.len());
        let agreed = self.pattern.agreement(self.received, &got[..expected]);
        self.received += agreed as u64;
        while let Some(first) = self.waiting.front()
            && first.end <= self.received
        {
            answer(*first);
            self.answered += 1;
            self.waiting.pop_front();
        }
        if agreed < got.len() { Err(Unexpected { from: agreed }) } else { Ok(()) }
    }

    /// Describes what is wrong with `rest`, the bytes that came and were not expected. `opened` is the number of
    /// connections opened so far.
    pub(super) fn explain(&self, rest: &[u8], opened: u64) -> Mismatch {
        let shown = rest.len().min(BYTES_SHOWN);
        let left = usize::try_from(self.sent - self.received).unwrap_or(usize::MAX);
        let mut expected = vec![0; shown.min(left)];
        self.pattern.write(self.received, &mut expected);
        Mismatch {
            connection: self.number,
            offset: self.received,
            expected,
            got: rest[..shown].to_vec(),
            origin: self.origin(rest, left, opened),
        }
    }

    fn origin(&self, rest: &[u8], left: usize, opened: u64) -> Origin {
        let expected = &rest[..rest.len().min(left)];
        let goes_on = (1..=CERTAIN).any(|bytes| {
            expected.get(bytes..).is_some_and(|after| {
                after.len() >= CERTAIN
                    && self.pattern.agreement(self.received + bytes as u64, &after[..CERTAIN]) == CERTAIN
            })
        });
        if goes_on {
            return Origin::Changed;
        }
        match self.pattern.locate(rest, self.sent) {
            Some(offset) if offset > self.received => return Origin::Missing(offset - self.received),
            Some(offset) => return Origin::Repeated(offset),
            None => {}
        }
        let others = (opened.saturating_sub(CONNECTIONS_SEARCHED) + 1..=opened).rev();
        others
            .filter_map(|connection| {
                let offset = Pattern::of(self.seed, connection).locate(rest, OFFSET_END)?;
                Some(Origin::Foreign { connection, offset })
            })
            .next()
            .unwrap_or(Origin::Unknown)
    }
}

/// Some bytes were not the expected ones. The first wrong byte is at index `from`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unexpected {
    pub(super) from: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a connection that has sent two messages of 100 bytes, and their bytes.
    fn talk(number: u64) -> (Talk, Vec<u8>) {
        let mut talk = Talk::new(1, 2);
        talk.begin(number);
        let mut buffer = vec![0; 1000];
        talk.ask(&(100..=100), 5);
        talk.ask(&(100..=100), 6);
        let bytes = talk.outgoing(&mut buffer).to_vec();
        assert_eq!(bytes.len(), 200);
        talk.took(200);
        assert!(!talk.owes());
        (talk, bytes)
    }

    /// Takes all of `got` at once. Returns the offset and origin of the mismatch, if there is one.
    fn wrong(talk: &mut Talk, got: &[u8]) -> Option<(u64, Origin)> {
        let unexpected = talk.hear(got, |_| {}).err()?;
        let mismatch = talk.explain(&got[unexpected.from..], 10);
        Some((mismatch.offset, mismatch.origin))
    }

    #[test]
    fn an_answer_is_whole_with_its_last_byte() {
        let (mut talk, bytes) = talk(1);
        let mut answers = Vec::new();
        for byte in &bytes[..199] {
            talk.hear(&[*byte], |asked| answers.push((asked.bytes, asked.since_ns))).expect("right");
        }
        assert_eq!(answers, [(100, 5)]);
        talk.hear(&bytes[199..], |asked| answers.push((asked.bytes, asked.since_ns))).expect("right");
        assert_eq!(answers, [(100, 5), (100, 6)]);
        assert_eq!((talk.answered, talk.waiting().len()), (2, 0));
    }

    #[test]
    fn what_is_wrong_is_told() {
        let (mut changed, mut bytes) = talk(1);
        bytes[50] ^= 4;
        assert_eq!(wrong(&mut changed, &bytes), Some((50, Origin::Changed)));

        let (mut missing, bytes) = talk(1);
        let with_a_gap = [&bytes[..50], &bytes[57..]].concat();
        assert_eq!(wrong(&mut missing, &with_a_gap), Some((50, Origin::Missing(7))));

        let (mut repeated, bytes) = talk(1);
        let twice = [&bytes[..150], &bytes[50..]].concat();
        assert_eq!(wrong(&mut repeated, &twice), Some((150, Origin::Repeated(50))));
        assert_eq!(repeated.answered, 1, "what came before it counts");

        let (mut ours, bytes) = talk(1);
        let (_, theirs) = talk(2);
        let mixed = [&bytes[..100], &theirs[100..]].concat();
        let foreign = Origin::Foreign { connection: 2, offset: 100 };
        assert_eq!(wrong(&mut ours, &mixed), Some((100, foreign)));

        let (mut noise, _) = talk(1);
        assert_eq!(wrong(&mut noise, &[0; 100]), Some((0, Origin::Unknown)));
    }

    #[test]
    fn nothing_is_expected_that_was_not_sent() {
        let (mut talk, bytes) = talk(1);
        talk.hear(&bytes, |_| {}).expect("right");
        let mismatch = talk.explain(&bytes[180..], 1);
        assert_eq!(mismatch.origin, Origin::Repeated(180));
        assert!(mismatch.to_string().starts_with("connection 1, offset 200: expected nothing, got "));
        assert_eq!(wrong(&mut talk, &bytes[180..]), Some((200, Origin::Repeated(180))));

        // The message was asked and not sent yet. Its bytes are not expected even if they are right.
        let mut early = Talk::new(1, 1);
        early.begin(1);
        early.ask(&(100..=100), 5);
        let first = early.outgoing(&mut [0; 100]).to_vec();
        assert_eq!(early.hear(&first, |_| {}), Err(Unexpected { from: 0 }));
    }

    #[test]
    fn sizes_are_within_their_range_and_reach_its_ends() {
        let mut talk = Talk::new(9, 1000);
        talk.begin(1);
        (0..1000).for_each(|_| talk.ask(&(3..=10), 0));
        let sizes: Vec<u64> = talk.waiting().iter().map(|asked| asked.bytes).collect();
        for size in 3..=10 {
            let often = sizes.iter().filter(|other| **other == size).count();
            assert!((80..180).contains(&often), "{size}: {often} of 1000");
        }
        assert!(sizes.iter().all(|size| (3..=10).contains(size)));
    }
}
