//! Small edits of a valid input, as proptest generates and shrinks them.

use proptest::{collection::vec, prelude::*, sample::Index};

/// Bytes that an input may grow to.
const LONGEST: usize = 64 << 10;
/// Bytes at most that one edit takes from a place.
const PIECE: usize = 64;

/// Numbers at the limits of integers, of lengths and of tables.
const INTEGERS: [u64; 20] = [
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x00ff_ffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// The same, and others, as a text format has them.
const DECIMALS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "2",
    "255",
    "65535",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999999999999999999999",
    "0.5",
    "-0.0",
    "1e308",
    "1e999",
];

/// One change. Places and lengths are shares of what is there, so that an edit fits each input.
#[derive(Debug, Clone)]
pub enum Edit {
    Flip {
        at: Index,
        bit: u8,
    },
    Set {
        at: Index,
        byte: u8,
    },
    Insert {
        at: Index,
        bytes: Vec<u8>,
    },
    Delete {
        at: Index,
        length: usize,
    },
    /// Repeats a piece behind itself: nesting, long lists, long names.
    Repeat {
        at: Index,
        length: usize,
        times: usize,
    },
    Truncate {
        at: Index,
    },
    /// Overwrites with a piece of another valid input.
    Splice {
        at: Index,
        seed: Index,
        from: Index,
        length: usize,
    },
    /// Overwrites with an integer of 1, 2, 4 or 8 bytes.
    Integer {
        at: Index,
        value: usize,
        log_width: u8,
        big_endian: bool,
    },
    /// Replaces the next run of digits.
    Decimal {
        at: Index,
        value: usize,
    },
    /// Inserts or overwrites with a word of the format.
    Word {
        at: Index,
        word: Index,
        over: bool,
    },
}

pub fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    let length = || prop_oneof![4 => 1..=8usize, 1 => 1..=PIECE];
    prop_oneof![
        3 => (at(), 0..8u8).prop_map(|(at, bit)| Edit::Flip { at, bit }),
        3 => (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Set { at, byte }),
        2 => (at(), vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Edit::Insert { at, bytes }),
        2 => (at(), length()).prop_map(|(at, length)| Edit::Delete { at, length }),
        1 => (at(), length(), prop_oneof![9 => 1..=4usize, 1 => 1..=LONGEST])
            .prop_map(|(at, length, times)| Edit::Repeat { at, length, times }),
        1 => at().prop_map(|at| Edit::Truncate { at }),
        2 => (at(), at(), at(), length())
            .prop_map(|(at, seed, from, length)| Edit::Splice { at, seed, from, length }),
        3 => (at(), 0..INTEGERS.len(), 0..4u8, any::<bool>())
            .prop_map(|(at, value, log_width, big_endian)| Edit::Integer { at, value, log_width, big_endian }),
        3 => (at(), 0..DECIMALS.len()).prop_map(|(at, value)| Edit::Decimal { at, value }),
        4 => (at(), at(), any::<bool>()).prop_map(|(at, word, over)| Edit::Word { at, word, over }),
    ]
}

impl Edit {
    /// Changes `input`; `seeds` are the valid inputs and `words` the words of the format, neither empty.
    pub fn apply(&self, input: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&[u8]]) {
        // Behind the last byte is a place, too.
        let place = |at: &Index| at.index(input.len() + 1);
        let end = |start: usize, length: usize| input.len().min(start.saturating_add(length));
        match self {
            Self::Flip { at, bit } => {
                let at = place(at);
                input.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << bit);
            }
            Self::Set { at, byte } => {
                let at = place(at);
                input.get_mut(at).into_iter().for_each(|old| *old = *byte);
            }
            Self::Insert { at, bytes } => {
                let at = place(at);
                drop(input.splice(at..at, bytes.iter().copied()));
            }
            Self::Delete { at, length } => {
                let at = place(at);
                drop(input.drain(at..end(at, *length)));
            }
            Self::Repeat { at, length, times } => {
                let at = place(at);
                let piece = input[at..end(at, *length)].to_vec();
                let times = (*times).min(LONGEST.saturating_sub(input.len()) / piece.len().max(1));
                drop(input.splice(at..at, piece.repeat(times)));
            }
            Self::Truncate { at } => input.truncate(place(at)),
            Self::Splice { at, seed, from, length } => {
                let other = seed.get(seeds);
                let from = from.index(other.len() + 1);
                let piece = &other[from..other.len().min(from + length)];
                overwrite(input, place(at), piece);
            }
            Self::Integer { at, value, log_width, big_endian } => {
                let width = 1 << log_width;
                let bytes = INTEGERS[*value].to_le_bytes();
                let mut bytes = bytes[..width].to_vec();
                if *big_endian {
                    bytes.reverse();
                }
                overwrite(input, place(at), &bytes);
            }
            Self::Decimal { at, value } => {
                let at = place(at);
                let start = input[at..].iter().position(u8::is_ascii_digit).map_or(input.len(), |found| at + found);
                let digits = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                drop(input.splice(start..start + digits, DECIMALS[*value].bytes()));
            }
            Self::Word { at, word, over } => {
                let (at, word) = (place(at), *word.get(words));
                match over {
                    true => overwrite(input, at, word),
                    false => drop(input.splice(at..at, word.iter().copied())),
                }
            }
        }
    }
}

fn overwrite(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = input.len().min(at + bytes.len());
    drop(input.splice(at..end, bytes.iter().copied()));
}
