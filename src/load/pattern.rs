//! The bytes of a connection, in both directions, as a function of its number and the offset.
//!
//! A connection's stream is a sequence of 8-byte words, little-endian. Word *n* is `key + n * STEP`, wrapping, with a
//! random key for each connection. [`STEP`] is odd, so no two words of a stream are equal within its 2⁶⁴ words.
//! Therefore bytes that are lost, repeated or moved leave a difference in the words after them, whatever their number.
//! A piece of a word can look like a piece of another. If single bytes are swapped, one pair in 256 are equal, and then
//! nothing is wrong.
//!
//! The step is 2⁶⁴ over the golden ratio, so every byte of a word differs from that of the next word. This is Weyl's
//! sequence (Knuth, *The Art of Computer Programming*, volume 3, 6.4).
//!
//! The streams of all connections are pieces of one cycle of 2⁶⁴ words, and begin at random places. So the same bytes
//! at the same offset of two connections are as likely as two equal random keys.
//!
//! The checker keeps no copy of the bytes that were sent. A word contains its own number, so unexpected bytes show
//! where they come from. Writing and comparing cost about as much as copying.

const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// `STEP * STEP_INVERSE` is 1, wrapping.
const STEP_INVERSE: u64 = inverse(STEP);

const WORD: usize = size_of::<u64>();

/// Words that are compared before the checker looks whether all were right. Because the number is constant, the
/// compiler can compare several at once.
const BLOCK: usize = 32;

/// A terabyte, which is beyond any offset that a connection reaches. It is short enough that pieces of this length of
/// the cycle are most unlikely to overlap.
pub(super) const OFFSET_END: u64 = 1 << 40;

/// Bytes that must agree before the checker concludes that they belong to some place. By accident so many agree in no
/// run.
pub(super) const CERTAIN: usize = 2 * WORD;

/// The bytes of one connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    key: u64,
}

impl Pattern {
    pub(super) fn of(seed: u64, number: u64) -> Self {
        Pattern { key: mix(seed.wrapping_add(mix(number))) }
    }

    /// A random number for the size of a message, from the same seed.
    pub(super) fn draw(self, message: u64) -> u64 {
        mix(!self.key ^ mix(message))
    }

    fn word(self, number: u64) -> u64 {
        self.key.wrapping_add(number.wrapping_mul(STEP))
    }

    /// Fills `out` with the bytes from `offset` on.
    pub(super) fn write(self, offset: u64, out: &mut [u8]) {
        let (head, words) = out.split_at_mut(to_the_word(offset, out.len()));
        self.write_piece(offset, head);
        let first = (offset + head.len() as u64) / WORD as u64;
        let (words, tail) = words.as_chunks_mut::<WORD>();
        let mut value = self.word(first);
        for word in &mut *words {
            *word = value.to_le_bytes();
            value = value.wrapping_add(STEP);
        }
        self.write_piece((first + words.len() as u64) * WORD as u64, tail);
    }

    /// Writes fewer bytes than a word has, all from one word.
    fn write_piece(self, offset: u64, out: &mut [u8]) {
        let word = self.word(offset / WORD as u64).to_le_bytes();
        let from = (offset % WORD as u64) as usize;
        out.copy_from_slice(&word[from..from + out.len()]);
    }

    /// How many bytes of `got` are right from `offset` on, up to the first that is wrong.
    pub(super) fn agreement(self, offset: u64, got: &[u8]) -> usize {
        let mut agreed = 0;
        while agreed < got.len() {
            let at = offset + agreed as u64;
            let rest = &got[agreed..];
            let length = if at.is_multiple_of(WORD as u64) && rest.len() >= BLOCK * WORD {
                let (blocks, _) = rest.as_chunks::<{ BLOCK * WORD }>();
                let whole = blocks
                    .iter()
                    .enumerate()
                    .take_while(|(n, block)| self.is_block(at / WORD as u64 + (n * BLOCK) as u64, block));
                whole.count() * BLOCK * WORD
            } else {
                0
            };
            if length > 0 {
                agreed += length;
                continue;
            }
            // Compares up to the next word, within a block that differs, or at the end.
            let piece = to_the_word(at, rest.len());
            let piece = if piece > 0 { piece } else { rest.len().min(WORD) };
            let mut expected = [0; WORD];
            self.write(at, &mut expected[..piece]);
            let same =
                rest.iter().zip(&expected[..piece]).take_while(|(got, expected)| got == expected).count();
            agreed += same;
            if same < piece {
                break;
            }
        }
        agreed
    }

    fn is_block(self, first: u64, block: &[u8; BLOCK * WORD]) -> bool {
        let (words, _) = block.as_chunks::<WORD>();
        let mut value = self.word(first);
        let mut different = 0;
        for word in words {
            different |= u64::from_le_bytes(*word) ^ value;
            value = value.wrapping_add(STEP);
        }
        different == 0
    }

    /// The offset below `end` at which the stream has these bytes. `None` if it has them nowhere, or if they are too
    /// few to tell.
    pub(super) fn locate(self, got: &[u8], end: u64) -> Option<u64> {
        (0..WORD).find_map(|before| {
            let word = got.get(before..)?.first_chunk::<WORD>()?;
            let number = u64::from_le_bytes(*word).wrapping_sub(self.key).wrapping_mul(STEP_INVERSE);
            let offset = number.checked_mul(WORD as u64)?.checked_sub(before as u64)?;
            let looked_at = &got[..got.len().min(CERTAIN)];
            let found = offset < end && self.agreement(offset, looked_at) >= CERTAIN;
            found.then_some(offset)
        })
    }
}

/// The number of bytes from `offset` to the next word, at most `length`.
fn to_the_word(offset: u64, length: usize) -> usize {
    ((WORD - (offset % WORD as u64) as usize) % WORD).min(length)
}

/// The multiplicative inverse of an odd number, by Newton's iteration. Each step doubles the number of right bits. The
/// number itself has three of them.
const fn inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut bits = 3;
    while bits < 64 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse)));
        bits *= 2;
    }
    inverse
}

/// The finalizer of SplitMix64, of Steele, Lea and Flood, 2014 (<https://prng.di.unimi.it/splitmix64.c>).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(STEP);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(pattern: Pattern, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        pattern.write(offset, &mut bytes);
        bytes
    }

    #[test]
    fn any_piece_is_the_same_as_in_the_whole() {
        let pattern = Pattern::of(1, 2);
        let whole = bytes(pattern, 0, 2000);
        for offset in 0..40 {
            for length in [0, 1, 7, 8, 9, 100, 255, 256, 257, 700] {
                let piece = bytes(pattern, offset as u64, length);
                assert_eq!(piece, whole[offset..offset + length], "{length} at {offset}");
                assert_eq!(pattern.agreement(offset as u64, &piece), length);
            }
        }
    }

    #[test]
    fn any_flipped_bit_is_found_at_its_offset() {
        let pattern = Pattern::of(1, 2);
        for start in [0, 3, 8] {
            let mut piece = bytes(pattern, start, 600);
            for at in 0..piece.len() {
                for bit in [0, 3, 7] {
                    piece[at] ^= 1 << bit;
                    assert_eq!(pattern.agreement(start, &piece), at, "bit {bit} from {start}");
                    piece[at] ^= 1 << bit;
                }
            }
        }
    }

    #[test]
    fn any_shift_is_seen_within_a_few_bytes_and_located() {
        let pattern = Pattern::of(7, 1);
        for shift in (1..5000).chain([65_521, 65_536, 1 << 20, 1 << 33, (1 << 33) + 5]) {
            let shifted = bytes(pattern, shift, 64);
            let agreed = pattern.agreement(0, &shifted);
            assert!(agreed < 8, "shift {shift}: {agreed} bytes agree");
            assert_eq!(pattern.locate(&shifted, shift + 64), Some(shift));
            assert_eq!(pattern.locate(&shifted, shift), None, "not sent yet");
        }
    }

    #[test]
    fn connections_have_nothing_in_common_and_are_told_apart() {
        let ours = Pattern::of(7, 1);
        for number in 2..2000 {
            let theirs = bytes(Pattern::of(7, number), 0, 64);
            assert!(ours.agreement(0, &theirs) < 4);
            assert_eq!(ours.locate(&theirs, OFFSET_END), None);
            assert_eq!(Pattern::of(7, number).locate(&theirs[3..], OFFSET_END), Some(3));
        }
        assert_eq!(ours.locate(&bytes(ours, 0, CERTAIN - 1), OFFSET_END), None, "too few to tell");
    }
}
