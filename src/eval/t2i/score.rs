//! The scores of generated images: Fréchet distance to real images, and similarity with the captions.

use super::{Evaluation, images::Images};
use crate::{
    error::{Context, Result, ensure, failed},
    eval::{features::Features, fid},
    report,
};
use serde::Serialize;
use std::path::Path;

/// The scores of all images.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scores {
    pub images: usize,
    /// Fréchet distance between the features of generated and of real images: with Inception's features, the FID.
    pub distance: Option<f64>,
    /// Cosine of an image and its caption by the matcher.
    pub cosine: Mean,
    /// CLIP score as torchmetrics defines it: 100 · max(cosine, 0).
    pub clip_score: Mean,
}

/// A mean over images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    pub mean: f64,
    /// Bounds of the 95 % interval: 1.96 standard errors.
    pub interval: [f64; 2],
}

impl Mean {
    fn of(values: &[f64]) -> Self {
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let half = 1.96 * (squares / (count - 1.0).max(1.0) / count).sqrt();
        Self { mean, interval: [mean - half, mean + half] }
    }
}

/// The scores of the images in `folder`; see [`Evaluation::score`].
pub(super) fn score(evaluation: &Evaluation, folder: &Path, real: Option<&str>) -> Result<Scores> {
    let Evaluation { prompts, features, .. } = evaluation;
    let images = Images { evaluation, folder };
    // What the protocol leaves out of the distance.
    let mut used = features.used(prompts.len());
    let message = format!("the compared features need more than {} images", prompts.len());
    ensure!(used > 0 || real.is_none(), failed(message, "raise --samples, or choose another --protocol"));
    let (mut moments, mut cosines) = (None::<fid::Moments>, Vec::with_capacity(prompts.len()));
    for chunk in 0..images.chunks() {
        let [features, of_chunk] = images.features(chunk)?;
        cosines.extend(of_chunk.to_vec1::<f32>()?.into_iter().map(f64::from));
        let count = used.min(features.dim(0)?);
        used -= count;
        if count == 0 || real.is_none() {
            continue;
        }
        fid::Moments::add_to(&mut moments, &features.narrow(0, 0, count)?)?;
    }
    ensure!(cosines.len() == prompts.len(), "the features are of {} images, not {}", cosines.len(), prompts.len());
    let distance = match real {
        None => None,
        Some(real) => Some(moments.context("no features")?.gaussian()?.distance(&gaussian(features, real)?)?),
    };
    let scores: Vec<f64> = cosines.iter().map(|cosine| 100.0 * cosine.max(0.0)).collect();
    Ok(Scores { images: cosines.len(), distance, cosine: Mean::of(&cosines), clip_score: Mean::of(&scores) })
}

/// Mean and covariance of the features of real images, or stored statistics of them.
fn gaussian(features: &Features, real: &str) -> Result<fid::Gaussian> {
    if real.ends_with(".npz") {
        return features.statistics(Path::new(real));
    }
    let moments = features.moments(real)?;
    if moments.count() < features.width() {
        report::warn(format_args!(
            "`{real}` has only {} images; the distance of fewer than {} is too high",
            moments.count(),
            features.width()
        ));
    }
    moments.gaussian()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_two_standard_errors() {
        let found = Mean::of(&[1.0, 2.0, 3.0, 4.0]);
        // Standard deviation (with n - 1) 1.290994, standard error 0.645497.
        assert!((found.mean - 2.5).abs() < 1e-12 && (found.interval[1] - 2.5 - 1.96 * 0.645_497).abs() < 1e-5);
        assert_eq!(Mean::of(&[7.0]).interval, [7.0, 7.0]);
    }
}
