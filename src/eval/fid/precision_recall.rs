//! Precision and recall of generated images (arXiv 1904.06991): the share of generated features among the real ones, and of
//! real ones among the generated, where a set covers the balls around its features that reach to their 3rd neighbour.

use crate::error::{Result, ensure, failed};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::Serialize;

const NEIGHBOURS: usize = 3;
/// Number of features whose distances are in memory together.
const BLOCK: usize = 1024;

/// The two shares.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrecisionRecall {
    pub precision: f64,
    pub recall: f64,
    pub neighbours: usize,
}

/// Of features `(count, dim)` of generated and of real images.
///
/// # Errors
/// A set has too few features.
pub fn precision_recall(generated: &Tensor, real: &Tensor) -> Result<PrecisionRecall> {
    let fewest = generated.dim(0)?.min(real.dim(0)?);
    let message = format!("precision and recall need more than {NEIGHBOURS} images on each side, not {fewest}");
    ensure!(fewest > NEIGHBOURS, failed(message, "give more images"));
    let [generated, real] = [generated.to_dtype(DType::F64)?, real.to_dtype(DType::F64)?];
    let precision = covered(&generated, &real)?;
    Ok(PrecisionRecall { precision, recall: covered(&real, &generated)?, neighbours: NEIGHBOURS })
}

/// The share of `features` in the balls around `others`.
fn covered(features: &Tensor, others: &Tensor) -> Result<f64> {
    let mut radii = Vec::with_capacity(others.dim(0)?);
    by_rows(others, others, |row| {
        let mut row = row.to_vec();
        // The nearest is the feature itself.
        let (_, radius, _) = row.select_nth_unstable_by(NEIGHBOURS, f64::total_cmp);
        *radius
    })?
    .into_iter()
    .for_each(|radius| radii.push(radius));
    let inside = by_rows(features, others, |row| row.iter().zip(&radii).any(|(distance, radius)| distance <= radius))?;
    Ok(inside.iter().filter(|inside| **inside).count() as f64 / inside.len() as f64)
}

/// `f` of the squared distances of each feature from all `others`.
fn by_rows<T: Send>(features: &Tensor, others: &Tensor, f: impl Fn(&[f64]) -> T + Sync) -> Result<Vec<T>> {
    let norms: Vec<f64> = others.sqr()?.sum(1)?.to_vec1()?;
    let (count, transposed) = (features.dim(0)?, others.t()?.contiguous()?);
    let mut found = Vec::with_capacity(count);
    for first in (0..count).step_by(BLOCK) {
        let block = features.narrow(0, first, BLOCK.min(count - first))?;
        let own: Vec<f64> = block.sqr()?.sum(1)?.to_vec1()?;
        let mut products: Vec<f64> = block.matmul(&transposed)?.flatten_all()?.to_vec1()?;
        let row = |(own, row): (&f64, &mut [f64])| {
            row.iter_mut().zip(&norms).for_each(|(value, norm)| *value = (own + norm - 2.0 * *value).max(0.0));
            f(row)
        };
        found.par_extend(own.par_iter().zip(products.par_chunks_mut(norms.len())).map(row));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{nn::weights, ops::testing::values};

    /// Against torch-fidelity (scripts/golden_fid.py).
    #[test]
    fn shares_are_torch_fidelity_s() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/fid.safetensors"), "golden")?;
        let found = precision_recall(&golden["features.a"], &golden["features.b"])?;
        let theirs = values(&golden["prc"]);
        assert!((found.precision - theirs[0]).abs() < 1e-6 && (found.recall - theirs[1]).abs() < 1e-6, "{found:?}");
        let same = precision_recall(&golden["features.c"], &golden["features.c"])?;
        assert_eq!((same.precision, same.recall), (1.0, 1.0));
        assert!(precision_recall(&golden["features.a"], &golden["features.b"].narrow(0, 0, 3)?).is_err());
        Ok(())
    }
}
