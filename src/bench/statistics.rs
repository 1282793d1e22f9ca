//! Statistics of repeated measurements.

use serde::Serialize;

/// Times of the repetitions in seconds, their median and their spread.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spread {
    /// In the order in which they were measured.
    pub all: Vec<f64>,
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// Median absolute deviation from the median.
    pub mad: f64,
}

impl Spread {
    /// Statistics of at least one repetition; all zero without any.
    pub fn of(all: Vec<f64>) -> Self {
        let median = median(all.iter().copied());
        let mad = self::median(all.iter().map(|x| (x - median).abs()));
        let min = all.iter().copied().reduce(f64::min).unwrap_or(0.0);
        let max = all.iter().copied().reduce(f64::max).unwrap_or(0.0);
        Self { all, median, min, max, mad }
    }
}

/// The middle value, or the mean of the two middle ones.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread_by_hand() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0, 100.0, 2.5]);
        assert_eq!((spread.median, spread.min, spread.max, spread.mad), (2.5, 1.0, 100.0, 0.5));
        assert_eq!(spread.all, [3.0, 1.0, 2.0, 100.0, 2.5]);
        let even = Spread::of(vec![4.0, 1.0]);
        assert_eq!((even.median, even.mad), (2.5, 1.5));
        assert_eq!(Spread::of(vec![7.0]), Spread { all: vec![7.0], median: 7.0, min: 7.0, max: 7.0, mad: 0.0 });
        assert_eq!(Spread::of(Vec::new()).median, 0.0);
    }
}
