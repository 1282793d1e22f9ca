//! Inception Score (arXiv 1606.03498): e to the mean Kullback-Leibler divergence of an image's classes from those of all
//! images, over splits as in torch-fidelity.

use super::super::choose;
use crate::error::{Result, ensure, failed};
use candle_core::{D, DType, Tensor};
use serde::Serialize;

/// Number of splits.
const SPLITS: usize = 10;

/// The score over splits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InceptionScore {
    pub mean: f64,
    /// Standard deviation over splits.
    pub std: f64,
    pub splits: usize,
}

/// The score of logits `(count, classes)`, in an order chosen by `seed`.
///
/// # Errors
/// There are fewer images than splits.
pub fn inception_score(logits: &Tensor, seed: u64) -> Result<InceptionScore> {
    let count = logits.dim(0)?;
    let message = format!("the Inception Score needs at least {SPLITS} images, not {count}");
    ensure!(count >= SPLITS, failed(message, "give more images"));
    let order = choose(count, count, seed, "eval inception score", 0).into_iter().map(|i| i as u32);
    of_splits(&logits.index_select(&Tensor::from_iter(order, logits.device())?, 0)?, SPLITS)
}

fn of_splits(logits: &Tensor, splits: usize) -> Result<InceptionScore> {
    let count = logits.dim(0)?;
    let logits = logits.to_dtype(DType::F64)?;
    let logits = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let log_p = logits.broadcast_sub(&logits.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    let score = |split: usize| -> Result<f64> {
        let (first, end) = (split * count / splits, (split + 1) * count / splits);
        let log_p = log_p.narrow(0, first, end - first)?;
        let p = log_p.exp()?;
        let divergences = (&p * log_p.broadcast_sub(&p.mean_keepdim(0)?.log()?)?)?.sum(1)?;
        Ok(divergences.mean_all()?.to_scalar::<f64>()?.exp())
    };
    let scores = (0..splits).map(score).collect::<Result<Vec<_>>>()?;
    let mean = scores.iter().sum::<f64>() / splits as f64;
    let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / splits as f64;
    Ok(InceptionScore { mean, std: variance.sqrt(), splits })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{nn::weights, ops::testing::values};

    /// Against torch-fidelity (scripts/golden_fid.py).
    #[test]
    fn scores_are_torch_fidelity_s() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/fid.safetensors"), "golden")?;
        let (found, theirs) = (of_splits(&golden["logits"], 5)?, values(&golden["isc"]));
        assert!((found.mean - theirs[0]).abs() < 1e-6 && (found.std - theirs[1]).abs() < 1e-6, "{found:?}");
        assert_eq!(inception_score(&golden["logits"], 1)?, inception_score(&golden["logits"], 1)?);
        assert!(inception_score(&golden["logits"].narrow(0, 0, 9)?, 1).is_err());
        Ok(())
    }
}
