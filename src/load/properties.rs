//! Properties of the checker that hold whatever a service does to one byte, and however the bytes come back.
//!
//! [`check`] asserts them of one case. The tests below make up some thousands of cases, and the fuzzer of `fuzz/` finds
//! any number. This module is built for these two only.

use super::pattern::Pattern;
use super::report::{Mismatch, Origin};
use super::talk::Talk;

/// Bytes of a mismatch within which its origin is always found.
const ENOUGH: usize = 32;

/// One connection's messages, the fault in one byte on the way back, and the pieces in which all bytes go and come.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    /// The connection's number, from 1. The next connection is the same without the fault.
    pub(crate) connection: u64,
    pub(crate) messages: usize,
    pub(crate) least: u64,
    pub(crate) most: u64,
    /// The numbers of bytes of the pieces, over and over.
    pub(crate) pieces: Vec<usize>,
    /// Which byte has the fault, modulo the number of bytes, and which fault.
    pub(crate) fault: Option<(usize, Fault)>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// These bits are flipped, and at least one bit.
    Change(u8),
    Drop,
    Repeat,
    /// Another byte comes before it.
    Insert(u8),
}

/// Asserts the properties of one case:
///
/// - The fault is reported as soon as it is heard, with its connection and offset. If there are enough bytes to tell,
///   the report says where they belong.
/// - A stream that only ends too early never counts as answered.
/// - The same messages on another connection, with no fault, are right.
///
/// # Panics
///
/// If a property does not hold.
pub(crate) fn check(case: &Case) {
    let next = Case { connection: case.connection + 1, fault: None, ..case.clone() };
    converse(&next);
    converse(case);
}

fn converse(case: &Case) {
    let mut talk = Talk::new(case.seed, case.messages);
    talk.begin(case.connection);
    (0..case.messages).for_each(|message| talk.ask(&(case.least..=case.most), message as u64));
    let length: u64 = talk.waiting().iter().map(|asked| asked.bytes).sum();
    let mut right = vec![0; usize::try_from(length).expect("a few messages")];
    Pattern::of(case.seed, case.connection).write(0, &mut right);
    let fault = case.fault.map(|(at, fault)| (at % right.len(), fault));
    let came = harmed(&right, fault);

    let mut buffer = vec![0; right.len()];
    let mut pieces = case.pieces.iter().copied().cycle();
    let mut piece = move |left: usize| pieces.next().unwrap_or(usize::MAX).clamp(1, left);
    let (mut sent, mut heard, mut answered) = (0, 0, Vec::new());
    while heard < came.len() {
        if sent < right.len() {
            let room = piece(right.len() - sent);
            let outgoing = talk.outgoing(&mut buffer[..room]);
            assert_eq!(outgoing, &right[sent..sent + room], "what is sent, from {sent} on");
            talk.took(room);
            sent += room;
        }
        // The number of bytes that the service has sent back by now.
        let back = match fault {
            Some((at, _)) if sent > at => came.len() - (right.len() - sent),
            _ => sent,
        };
        while heard < back {
            let got = &came[heard..heard + piece(back - heard)];
            let expected = &right[heard..sent];
            let agreed = got.iter().zip(expected).take_while(|(got, expected)| got == expected).count();
            let verdict = talk.hear(got, |asked| answered.push((asked.since_ns, asked.bytes)));
            assert_eq!(
                verdict.err().map(|unexpected| unexpected.from),
                (agreed < got.len()).then_some(agreed)
            );
            heard += agreed;
            if agreed < got.len() {
                let mismatch = talk.explain(&got[agreed..], case.connection + 1);
                assert_told(&mismatch, case, fault, heard, &right[heard..sent], &got[agreed..]);
                return;
            }
        }
    }
    let whole: Vec<u64> = answered.iter().map(|(message, _)| *message).collect();
    assert!(whole.iter().copied().eq(0..whole.len() as u64), "answered in another order: {whole:?}");
    match fault {
        None => assert_eq!(talk.answered, case.messages as u64, "all came, and some are not answered"),
        Some((_, Fault::Drop)) => {
            assert!(talk.answered < case.messages as u64, "a byte is missing, and all are answered");
        }
        Some(fault) => panic!("not reported: {fault:?}"),
    }
}

/// The stream with the fault in it.
fn harmed(right: &[u8], fault: Option<(usize, Fault)>) -> Vec<u8> {
    let mut came = right.to_vec();
    match fault {
        None => {}
        Some((at, Fault::Change(bits))) => came[at] ^= bits.max(1),
        Some((at, Fault::Drop)) => drop(came.remove(at)),
        Some((at, Fault::Repeat)) => came.insert(at, right[at]),
        Some((at, Fault::Insert(byte))) => came.insert(at, byte),
    }
    came
}

/// Asserts that the mismatch has the right connection, offset, expected bytes, received bytes, and origin.
fn assert_told(
    mismatch: &Mismatch,
    case: &Case,
    fault: Option<(usize, Fault)>,
    offset: usize,
    expected: &[u8],
    got: &[u8],
) {
    let Some((at, fault)) = fault else { panic!("nothing is wrong, and yet: {mismatch}") };
    assert_eq!((mismatch.connection, mismatch.offset), (case.connection, offset as u64));
    assert!(offset >= at, "before the fault: {mismatch}");
    assert!(!mismatch.got.is_empty() && got.starts_with(&mismatch.got), "{mismatch}");
    assert!(expected.starts_with(&mismatch.expected), "{mismatch}");
    assert_eq!(mismatch.expected.is_empty(), expected.is_empty(), "{mismatch}");
    if got.len() < ENOUGH || expected.len() < ENOUGH {
        return;
    }
    match fault {
        Fault::Change(_) => assert_eq!(mismatch.origin, Origin::Changed),
        Fault::Drop => assert_eq!(mismatch.origin, Origin::Missing(1)),
        Fault::Repeat => assert_eq!(mismatch.origin, Origin::Repeated(mismatch.offset - 1)),
        // The inserted byte is foreign. The bytes after it are late, and only behind that byte can their place be
        // found.
        Fault::Insert(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn fault() -> impl Strategy<Value = Fault> {
        prop_oneof![
            (1..=255_u8).prop_map(Fault::Change),
            Just(Fault::Drop),
            Just(Fault::Repeat),
            any::<u8>().prop_map(Fault::Insert),
        ]
    }

    prop_compose! {
        fn case()(
            seed: u64,
            connection in 1..1000_u64,
            messages in 1..8_usize,
            (least, span) in prop_oneof![(1..20_u64, 0..20_u64), (1..1000_u64, 0..2000_u64)],
            pieces in vec(prop_oneof![1..40_usize, 1..3000_usize], 1..6),
            at: usize,
            fault in fault(),
        ) -> Case {
            Case { seed, connection, messages, least, most: least + span, pieces, fault: Some((at, fault)) }
        }
    }

    proptest! {
        #[test]
        fn one_wrong_byte_is_always_told_and_a_right_stream_never_is(case in case()) {
            check(&case);
        }
    }
}
