//! How well scores agree with the share of true pairs.

use super::{super::Rate, pairs::Pair};
use crate::error::{Result, anyhow};
use plotters::prelude::*;
use serde::Serialize;
use std::path::Path;

/// Bins of equal width between 0 and 1.
const BINS: usize = 10;

/// Reliability of scores on pairs of which half are shuffled.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reliability {
    pub pairs: usize,
    /// Pairs by their score: 0 to 0.1, 0.1 to 0.2, ..
    pub bins: Vec<Bin>,
    /// Mean of |mean score - share of true pairs| over the bins, weighted by their counts.
    pub expected_calibration_error: f64,
    /// True pairs among those with a score above 0.5.
    pub precision: Rate,
    /// Scores above 0.5 among the true pairs.
    pub recall: Rate,
}

/// The pairs with a score in an interval.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bin {
    pub count: usize,
    /// 0 without pairs.
    pub mean_score: f64,
    /// Share of true pairs; 0 without pairs.
    pub true_pairs: f64,
}

impl Reliability {
    /// The reliability of `score`, which maps a cosine to a probability.
    pub fn new(pairs: &[Pair], score: impl Fn(f64) -> f64) -> Self {
        let scored: Vec<(f64, bool)> = pairs.iter().map(|pair| (score(pair.cosine), pair.is_pair)).collect();
        let bins: Vec<Bin> = (0..BINS)
            .map(|bin| {
                let inside = |(score, _): &&(f64, bool)| ((score * BINS as f64) as usize).min(BINS - 1) == bin;
                let inside: Vec<_> = scored.iter().filter(inside).collect();
                let mean = |sum: f64| if inside.is_empty() { 0.0 } else { sum / inside.len() as f64 };
                Bin {
                    count: inside.len(),
                    mean_score: mean(inside.iter().map(|(score, _)| score).sum()),
                    true_pairs: mean(inside.iter().map(|(_, is_pair)| f64::from(u8::from(*is_pair))).sum()),
                }
            })
            .collect();
        let gap = |bin: &Bin| bin.count as f64 * (bin.mean_score - bin.true_pairs).abs();
        let expected_calibration_error = bins.iter().map(gap).sum::<f64>() / scored.len().max(1) as f64;
        let chosen = scored.iter().filter(|(score, _)| *score > 0.5).count();
        let hits = scored.iter().filter(|(score, is_pair)| *score > 0.5 && *is_pair).count();
        let of_pairs = scored.iter().filter(|(_, is_pair)| *is_pair).count();
        let (precision, recall) = (Rate::new(hits, chosen), Rate::new(hits, of_pairs));
        Self { pairs: scored.len(), bins, expected_calibration_error, precision, recall }
    }

    /// Draws the reliability diagram as SVG: the share of true pairs in each bin, beside the diagonal.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn plot(&self, path: &Path) -> Result<()> {
        // plotters' errors borrow the backend.
        self.draw(path).map_err(|e| anyhow!("cannot draw {}: {e}", path.display()))
    }

    fn draw(&self, path: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let root = SVGBackend::new(path, (480, 480)).into_drawing_area();
        root.fill(&WHITE)?;
        let caption = format!("reliability, calibration error {:.3}", self.expected_calibration_error);
        let mut chart = ChartBuilder::on(&root)
            .caption(caption, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
        let mesh = &mut chart.configure_mesh();
        mesh.x_desc("score").y_desc("share of true pairs").light_line_style(TRANSPARENT).draw()?;
        let blue = RGBColor(70, 110, 170);
        let filled = || self.bins.iter().enumerate().filter(|(_, bin)| bin.count > 0);
        chart.draw_series(filled().map(|(at, bin)| {
            let edge = |at: usize| at as f64 / BINS as f64;
            Rectangle::new([(edge(at) + 0.005, 0.0), (edge(at + 1) - 0.005, bin.true_pairs)], blue.mix(0.4).filled())
        }))?;
        chart.draw_series(filled().map(|(_, bin)| Circle::new((bin.mean_score, bin.true_pairs), 4, blue.filled())))?;
        chart.draw_series(LineSeries::new([(0.0, 0.0), (1.0, 1.0)], BLACK.stroke_width(1)))?;
        root.present()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_errors_precision_and_recall() {
        let pair = |cosine, is_pair| Pair { cosine, is_pair };
        let pairs = [pair(0.95, true), pair(0.91, true), pair(0.92, false), pair(0.12, false), pair(0.3, true)];
        let found = Reliability::new(&pairs, |cosine| cosine);
        let counts: Vec<usize> = found.bins.iter().map(|bin| bin.count).collect();
        assert_eq!(counts, [0, 1, 0, 1, 0, 0, 0, 0, 0, 3]);
        assert!((found.bins[9].mean_score - 2.78 / 3.0).abs() < 1e-12 && found.bins[9].true_pairs == 2.0 / 3.0);
        let expected = ((2.78 - 2.0) + 0.12 + 0.7) / 5.0;
        assert!((found.expected_calibration_error - expected).abs() < 1e-12);
        assert_eq!((found.precision.hits, found.precision.of, found.recall.of), (2, 3, 3));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        found.plot(&path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.matches("<circle").count() == 3);
        assert_eq!(Reliability::new(&[], |cosine| cosine).expected_calibration_error, 0.0);
        assert_eq!(Reliability::new(&[pair(1.0, true)], |cosine| cosine).bins[9].count, 1);
    }
}
