//! Random numbers keyed by (seed, purpose, step, index). Each can be drawn again without the ones before it, so that a
//! run can be repeated and resumed exactly.

/// A small generator (SplitMix64) seeded by a hashed key.
#[derive(Debug, Clone)]
pub struct Random(u64);

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// The generator for one key.
    pub fn keyed(seed: u64, purpose: &str, step: u64, index: u64) -> Self {
        let mut state = mix(seed ^ 0x9e37_79b9_7f4a_7c15);
        for byte in purpose.bytes() {
            state = mix(state ^ u64::from(byte));
        }
        Self(mix(mix(state ^ step) ^ index.rotate_left(32)))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Uniform in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..bound`; `bound` must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(bound)) >> 64) as u64
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * self.unit()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_independent_and_repeatable() {
        let draw = |purpose, step, index| Random::keyed(7, purpose, step, index).bits();
        assert_eq!(draw("a", 1, 2), draw("a", 1, 2));
        let all = [draw("a", 1, 2), draw("a", 2, 1), draw("b", 1, 2), draw("a", 1, 3)];
        assert!((0..4).all(|i| (0..i).all(|j| all[i] != all[j])));
    }

    #[test]
    fn mean_and_variance_are_right() {
        let mut random = Random::keyed(1, "test", 0, 0);
        let normal: Vec<f64> = (0..20_000).map(|_| random.normal()).collect();
        let mean = normal.iter().sum::<f64>() / 2e4;
        let variance = normal.iter().map(|x| x * x).sum::<f64>() / 2e4;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        assert!((0..1000).all(|_| random.below(7) < 7));
    }
}
