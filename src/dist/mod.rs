//! Ranks that train together, and what all of them call in the same order (paper §3.2).
//!
//! A [`Group`] is one rank's end. Every collective checks that all ranks called the same one with the same length; a
//! rank that fails, panics or stays away longer than the time limit makes the call an error on all others, never a hang.

mod local;
mod nccl;

pub use local::{Group, launch};

use std::ops::Range;

/// The `i`-th of `n` parts of `0..len`: sizes differ by one at most.
pub fn part(len: usize, i: usize, n: usize) -> Range<usize> {
    // In u128 because `len` times `n` may not fit.
    let at = |i: usize| (len as u128 * i as u128 / n.max(1) as u128) as usize;
    at(i)..at(i + 1)
}

#[cfg(test)]
mod tests;
