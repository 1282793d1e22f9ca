//! The learning rate over the run: linear warm-up, a plateau, then a decay.

use crate::config::{Decay, Train};

/// The share of the peak learning rate at `step` (counted from 1).
///
/// Warm-up reaches the peak at step `warmup_steps`; the decay runs from `decay_start · steps` (but
/// never before the warm-up's end) to `final_lr_ratio` at the last step. A ratio of 0 is reached one step later: the last
/// step would change nothing.
pub fn rate(config: &Train, step: u64) -> f64 {
    let (step, warmup, steps) = (step as f64, config.warmup_steps as f64, config.steps as f64);
    if step < warmup {
        return step / warmup;
    }
    let start = (config.decay_start * steps).max(warmup);
    if step <= start || steps <= start {
        return 1.0;
    }
    let end = if config.final_lr_ratio == 0.0 { steps + 1.0 } else { steps };
    let progress = ((step - start) / (end - start)).min(1.0);
    let left = match config.decay {
        Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        Decay::Linear => 1.0 - progress,
    };
    config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_holds_and_falls() {
        let mut config = Train {
            steps: 100,
            warmup_steps: 10,
            decay: Decay::Linear,
            decay_start: 0.6,
            final_lr_ratio: 0.1,
            ..Train::default()
        };
        let at = |config: &Train, step| (rate(config, step) * 1e6).round() / 1e6;
        assert_eq!([1, 5, 10, 60, 80, 100, 120].map(|s| at(&config, s)), [0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1]);
        config.decay = Decay::Cosine;
        assert_eq!([60, 80, 100].map(|s| at(&config, s)), [1.0, 0.55, 0.1]);
        assert!(rate(&config, 70) > 0.55 + 0.225, "a cosine starts flat");
        // A decay to nothing still gives the last step a rate.
        (config.decay, config.final_lr_ratio) = (Decay::Linear, 0.0);
        assert_eq!([60, 100, 101].map(|s| at(&config, s)), [1.0, (1e6 / 41.0_f64).round() / 1e6, 0.0]);
        config.warmup_steps = 0;
        config.decay_start = 1.0;
        assert_eq!([1, 100].map(|s| at(&config, s)), [1.0, 1.0]);
    }
}
