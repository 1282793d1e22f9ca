//! Kernel Inception Distance (arXiv 1801.01401): the squared maximum mean discrepancy of features with the kernel
//! (x·y / d + 1)³, without bias, over random subsets as in torch-fidelity.

use super::super::choose;
use crate::error::{Result, ensure, failed};
use candle_core::{DType, Tensor};
use serde::Serialize;

/// Number of subsets.
const SUBSETS: usize = 100;

/// The distance over subsets.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kid {
    pub mean: f64,
    /// Standard deviation over subsets, which papers give beside the mean.
    pub std: f64,
    /// Standard error of the mean over subsets.
    pub standard_error: f64,
    pub subsets: usize,
    pub subset_size: usize,
}

/// The distance of features `(count, dim)`, on subsets of `size` features of each that `seed` chooses.
///
/// # Errors
/// There are fewer than `size` features.
pub fn kid(a: &Tensor, b: &Tensor, size: usize, seed: u64) -> Result<Kid> {
    let fewest = a.dim(0)?.min(b.dim(0)?);
    let message = format!("KID on subsets of {size} images needs as many on each side, not {fewest}");
    ensure!(size <= fewest, failed(message, "give more images, or lower --kid-subset-size; name it beside the figure"));
    let mut distances = Vec::with_capacity(SUBSETS);
    for subset in 0..SUBSETS as u64 {
        let a = subset_of(a, size, seed, "eval kid a", subset)?;
        distances.push(discrepancy(&a, &subset_of(b, size, seed, "eval kid b", subset)?)?);
    }
    let mean = distances.iter().sum::<f64>() / SUBSETS as f64;
    let variance = distances.iter().map(|distance| (distance - mean).powi(2)).sum::<f64>() / SUBSETS as f64;
    let std = variance.sqrt();
    let standard_error = std / (SUBSETS as f64).sqrt();
    Ok(Kid { mean, std, standard_error, subsets: SUBSETS, subset_size: size })
}

fn subset_of(features: &Tensor, size: usize, seed: u64, purpose: &str, subset: u64) -> Result<Tensor> {
    let chosen = choose(size, features.dim(0)?, seed, purpose, subset).into_iter().map(|i| i as u32);
    let index = Tensor::from_iter(chosen, features.device())?;
    Ok(features.index_select(&index, 0)?)
}

/// The unbiased squared discrepancy of two sets of as many features.
fn discrepancy(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (count, dim) = a.dims2()?;
    let [a, b] = [a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?];
    let kernel = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
        let product = ((a.matmul(&b.t()?)? / dim as f64)? + 1.0)?;
        Ok(((&product * &product)? * product)?)
    };
    let sum = |kernel: &Tensor| -> Result<f64> { Ok(kernel.sum_all()?.to_scalar()?) };
    let others = |x: &Tensor| -> Result<f64> {
        let norms = ((x.sqr()?.sum(1)? / dim as f64)? + 1.0)?;
        Ok(sum(&kernel(x, x)?)? - sum(&((&norms * &norms)? * norms)?)?)
    };
    let n = count as f64;
    Ok((others(&a)? + others(&b)?) / (n * (n - 1.0)) - 2.0 * sum(&kernel(&a, &b)?)? / (n * n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{nn::weights, ops::testing::values};

    /// Against torch-fidelity (scripts/golden_fid.py): one subset of all features.
    #[test]
    fn the_discrepancy_is_torch_fidelity_s() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/fid.safetensors"), "golden")?;
        let (a, b) = (golden["features.a"].narrow(0, 0, 60)?, &golden["features.b"]);
        let (ours, theirs) = (discrepancy(&a, b)?, values(&golden["kid"])[0]);
        assert!((ours - theirs).abs() < 1e-6 * theirs, "{ours} instead of {theirs}");

        let found = kid(&golden["features.a"], b, 40, 3)?;
        assert_eq!((found.subsets, found.subset_size), (100, 40));
        assert!((found.mean - theirs).abs() < 5.0 * found.std && found.std > 10.0 * found.standard_error / 1.001);
        assert_eq!(found, kid(&golden["features.a"], b, 40, 3)?, "keyed by the seed");
        assert_ne!(found, kid(&golden["features.a"], b, 40, 4)?);
        assert!(kid(&golden["features.a"], b, 61, 3).is_err());
        Ok(())
    }
}
