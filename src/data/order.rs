//! What both orders of samples are made of: random permutations, and the shares of the sources.

use crate::random::Random;

/// Rounds of the Feistel network.
const ROUNDS: u64 = 6;

/// A keyed permutation of `0..n` that is computed, not stored: a balanced Feistel network over the smallest even number
/// of bits that holds `n`, applied repeatedly until the result is below `n` (cycle walking).
#[derive(Debug, Clone)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS as usize],
}

impl Permutation {
    pub fn new(n: u64, seed: u64, purpose: &str, step: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let keys = std::array::from_fn(|round| Random::keyed(seed, purpose, step, round as u64).bits());
        Self { n, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Maps `index` (below `n`) to its place in the permutation.
    pub fn at(&self, index: u64) -> u64 {
        let mut value = index;
        loop {
            value = self.feistel(value);
            if value < self.n {
                return value;
            }
        }
    }

    fn feistel(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            let noise = Random::keyed(key, "", 0, right).bits();
            (left, right) = (right, left ^ (noise & mask));
        }
        left << self.half_bits | right
    }
}

/// The sample at one position of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Epoch over the mixed sources.
    pub epoch: u64,
    /// Number of earlier visits of this sample.
    pub turn: u64,
    /// Index of the source.
    pub source: usize,
    /// Index of the sample in its source.
    pub sample: u64,
}

/// What an epoch shows of one source.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// Number of samples of the source.
    pub samples: u64,
    /// Number of samples that an epoch shows.
    pub shown: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_permutation_is_a_bijection() {
        for n in (1..70).chain([1000, 4097]) {
            let order = Permutation::new(n, 3, "test", 0);
            let hit: BTreeSet<u64> = (0..n).map(|i| order.at(i)).collect();
            assert!(hit.len() as u64 == n && hit.last() == Some(&(n - 1)), "{n}");
        }
    }

    #[test]
    fn a_permutation_shuffles() {
        let n = 10_000;
        let of = |step| Permutation::new(n, 3, "test", step);
        let fixed = (0..n).filter(|i| of(0).at(*i) == *i).count();
        let same = (0..n).filter(|i| of(0).at(*i) == of(1).at(*i)).count();
        let neighbours = (1..n).filter(|i| of(0).at(*i).abs_diff(of(0).at(i - 1)) < 10).count();
        // All three are about Poisson with means 1, 1 and 19.
        assert!(fixed < 8 && same < 8 && neighbours < 50, "{fixed} {same} {neighbours}");
    }
}
