//! Sums of exponentials over a row of logits, block by block, for sampling a token and for its log probability.

use crate::ops::simd::{self, Real, multiversion, sum};

/// Number of elements of a block.
pub const BLOCK: usize = 64;

/// The largest element; -∞ for an empty slice.
pub fn greatest(x: &[f32]) -> f32 {
    simd::max(x)
}

/// Σ exp(scale · (xᵢ − top)) for each block of [`BLOCK`] elements; the last block may be shorter. NaN stays NaN.
pub fn exp_sums(x: &[f32], top: f32, scale: f32) -> Vec<f32> {
    let mut sums = vec![0.0; x.len().div_ceil(BLOCK)];
    fill(&mut sums, x, top, scale);
    sums
}

/// exp(scale · (x − top)), one term of these sums.
#[inline(always)]
pub fn term<T: Real>(x: T, top: T, scale: T) -> T {
    Real::exp((x - top) * scale)
}

/// ln Σ exp(xᵢ)
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let top = greatest(x);
    f64::from(top) + exp_sums(x, top, 1.0).into_iter().map(f64::from).sum::<f64>().ln()
}

multiversion! {
    fn fill<T: Real, const FMA: bool>(sums: &mut [T], x: &[T], top: T, scale: T) {
        for (total, x) in sums.iter_mut().zip(x.chunks(BLOCK)) {
            let mut terms = [T::ZERO; BLOCK];
            terms.iter_mut().zip(x).for_each(|(t, &x)| *t = term(x, top, scale));
            *total = sum(&terms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Result, ops::testing::at_each_level, random::Random};

    #[test]
    fn sums_by_definition() -> Result<()> {
        let mut random = Random::keyed(1, "softmax", 0, 0);
        let x: Vec<f32> = (0..1000).map(|_| random.normal() as f32 * 5.0).collect();
        at_each_level(|| {
            for n in [0, 1, 63, 64, 65, 1000] {
                let sums = exp_sums(&x[..n], 3.0, 0.7);
                assert_eq!(sums.len(), n.div_ceil(64));
                for (sum, x) in sums.iter().zip(x[..n].chunks(64)) {
                    let expected: f64 = x.iter().map(|&x| (0.7 * (f64::from(x) - 3.0)).exp()).sum();
                    assert!((f64::from(*sum) / expected - 1.0).abs() < 1e-5, "{sum} {expected}");
                }
            }
            let expected = x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            assert!((log_sum_exp(&x) - expected).abs() < 1e-5);
            assert!(log_sum_exp(&[0.0, f32::NAN]).is_nan());
            Ok(())
        })
    }
}
