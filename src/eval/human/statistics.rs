//! Means with confidence intervals.

use serde::Serialize;

/// A mean over items with its 95 % t-interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    pub mean: f64,
    /// Bounds of the interval; `None` for a single item.
    pub interval: Option<[f64; 2]>,
    pub items: usize,
}

impl Mean {
    /// The mean of one value for each item, with mean ± t(0.975, n − 1) · s / √n; `None` without values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let interval = (n > 1).then(|| {
            let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
            let half = t_975(n - 1) * (variance / n as f64).sqrt();
            [mean - half, mean + half]
        });
        Some(Self { mean, interval, items: n })
    }

    /// The same with an interval inside of `low..=high`, the possible values.
    pub fn within(self, low: f64, high: f64) -> Self {
        Self { interval: self.interval.map(|bounds| bounds.map(|bound| bound.clamp(low, high))), ..self }
    }
}

/// The 0.975 quantile of Student's t with `degrees` > 0 degrees of freedom, by bisection.
fn t_975(degrees: usize) -> f64 {
    let (mut low, mut high) = (0.0, 16.0);
    for _ in 0..64 {
        let middle = (low + high) / 2.0;
        if within(middle, degrees) < 0.95 { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// P(|T| ≤ t) for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
fn within(t: f64, degrees: usize) -> f64 {
    let angle = (t / (degrees as f64).sqrt()).atan();
    let (sine, squared) = (angle.sin(), angle.cos().powi(2));
    let odd = degrees % 2 == 1;
    // The term of the power k is that of k - 2, times (k - 1) / k and cos².
    let (mut term, mut sum) = if odd { (angle.cos(), 0.0) } else { (1.0, 0.0) };
    let mut power = if odd { 1 } else { 0 };
    while power + 2 <= degrees {
        sum += term;
        power += 2;
        term *= squared * (power - 1) as f64 / power as f64;
    }
    if odd { (angle + sine * sum) * std::f64::consts::FRAC_2_PI } else { sine * sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against SciPy (`scripts/golden_human.py`).
    #[test]
    fn quantiles_of_t() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../../tests/golden/human.json")).unwrap();
        let quantiles = golden["t_975"].as_array().unwrap();
        assert!(quantiles.len() > 10);
        for pair in quantiles {
            let (degrees, expected) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            let found = t_975(degrees);
            assert!((found - expected).abs() < 1e-8 * expected, "{degrees}: {found} instead of {expected}");
        }
    }

    #[test]
    fn an_interval_needs_two_items() {
        assert_eq!(Mean::of(&[]), None);
        assert_eq!(Mean::of(&[3.0]), Some(Mean { mean: 3.0, interval: None, items: 1 }));
        let found = Mean::of(&[1.0, 2.0, 3.0, 4.0]).unwrap();
        let [low, high] = found.interval.unwrap();
        // 2.5 ± 3.182446 · 1.290994 / 2
        assert!((low - 0.445739).abs() < 1e-5 && (high - 4.554261).abs() < 1e-5, "{low} {high}");
        assert_eq!(found.within(1.0, 4.0).interval, Some([1.0, 4.0]));
        assert_eq!(Mean::of(&[2.0, 2.0]).unwrap().interval, Some([2.0, 2.0]));
    }
}
