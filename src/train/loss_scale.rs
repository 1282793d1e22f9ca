//! Dynamic loss scaling: in f16 the gradients of most activations would round to zero (arXiv 1710.03740, §3.2).

use crate::config::{Config, Precision};
use serde::{Deserialize, Serialize};

/// What the loss is multiplied by, a power of two. Its sequence is that of PyTorch's `GradScaler`, down to 1: where not
/// even that is small enough, scaling is no help.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    factor: f32,
    /// Steps since it changed whose gradients were finite.
    finite: u32,
}

const START: f32 = 65536.0;
const INTERVAL: u32 = 2000;

impl LossScale {
    /// The first one; `None` where nothing is scaled.
    pub fn of(config: &Config) -> Option<Self> {
        let scaled = config.train.precision == Precision::F16;
        scaled.then_some(Self { factor: START, finite: 0 })
    }

    /// What the loss is multiplied by.
    pub fn factor(self) -> f64 {
        f64::from(self.factor)
    }

    /// After a step whose gradients are finite: doubled, if enough of them came in a row.
    pub fn grow(&mut self) {
        self.finite += 1;
        if self.finite == INTERVAL {
            self.finite = 0;
            if (2.0 * self.factor).is_finite() {
                self.factor *= 2.0;
            }
        }
    }

    /// After a step whose gradients are not finite: halved. Returns whether there was anything to halve.
    pub fn shrink(&mut self) -> bool {
        self.finite = 0;
        let above = self.factor > 1.0;
        if above {
            self.factor /= 2.0;
        }
        above
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_the_standard_one() {
        let mut scale = LossScale { factor: START, finite: 0 };
        let mut seen = Vec::new();
        // By step: whether its gradients are finite.
        let steps = [vec![false; 2], vec![true; 1999], vec![false], vec![true; 4000], vec![false; 17]].concat();
        for finite in steps {
            if finite {
                scale.grow()
            } else {
                assert_eq!(scale.shrink(), scale.finite == 0 && seen.last() != Some(&1.0))
            }
            if seen.last() != Some(&scale.factor()) {
                seen.push(scale.factor());
            }
        }
        let halves = (0..=14).rev().map(|power| f64::from(1 << power));
        let expected: Vec<f64> = [32768.0, 16384.0, 8192.0, 16384.0, 32768.0].into_iter().chain(halves).collect();
        assert_eq!(seen, expected);
        assert!(!scale.shrink() && scale.factor() == 1.0);
    }

    #[test]
    fn only_f16_is_scaled() {
        let mut config = Config::default();
        assert_eq!(LossScale::of(&config), None);
        config.train.precision = Precision::F16;
        assert_eq!(LossScale::of(&config).map(LossScale::factor), Some(65536.0));
        config.train.precision = Precision::Bf16;
        assert_eq!(LossScale::of(&config), None);
    }
}
