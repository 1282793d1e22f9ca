//! Detects spikes of the loss or the gradient norm for `train.spike`.
//!
//! A spike is more than [`SIGMA`] standard deviations above the mean of the last steps, as in OLMo 2
//! (arXiv 2501.00656, whose trainer skips such steps). Skipping a batch and continuing from an older checkpoint is
//! PaLM's way (arXiv 2204.02311, §5.1).

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Steps that are remembered.
const WINDOW: usize = 128;
/// Standard deviations above the mean from which a step is a spike.
const SIGMA: f64 = 6.0;

/// Loss and gradient norm of the last steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Spikes(VecDeque<[f64; 2]>);

impl Spikes {
    /// Whether a step is a spike; if not, it is remembered.
    pub fn is_spike(&mut self, loss: f64, norm: f64) -> bool {
        let step = [loss, norm];
        let spike = self.0.len() >= WINDOW / 2 && (0..2).any(|i| step[i] > self.limit(i));
        if !spike {
            self.0.push_back(step);
            if self.0.len() > WINDOW {
                self.0.pop_front();
            }
        }
        spike
    }

    fn limit(&self, i: usize) -> f64 {
        let count = self.0.len() as f64;
        let mean = self.0.iter().map(|step| step[i]).sum::<f64>() / count;
        let variance = self.0.iter().map(|step| (step[i] - mean).powi(2)).sum::<f64>() / count;
        mean + SIGMA * variance.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_leaves_the_usual_range_is_a_spike() {
        let mut spikes = Spikes::default();
        // Too little is known at first.
        assert!(!spikes.is_spike(1e9, 1.0));
        spikes = Spikes::default();
        for step in 0..300 {
            let noise = f64::from(step % 7) * 0.01;
            assert!(!spikes.is_spike(5.0 - 0.001 * f64::from(step) + noise, 1.0 + noise), "step {step}");
        }
        let before = spikes.clone();
        assert!(spikes.is_spike(9.0, 1.0) && spikes.is_spike(4.7, 3.0));
        assert_eq!(spikes, before, "a spike is not what is usual");
        assert!(!spikes.is_spike(4.8, 1.1) && !spikes.is_spike(0.1, 0.1));
    }

    #[test]
    fn what_is_remembered_comes_back_with_the_same_bits() {
        let mut spikes = Spikes::default();
        assert!((0..200).all(|step| !spikes.is_spike(1.0 / f64::from(step + 1), 0.1 * f64::from(step % 3))));
        let text = serde_json::to_string(&spikes).unwrap();
        assert_eq!(serde_json::from_str::<Spikes>(&text).unwrap(), spikes);
    }
}
