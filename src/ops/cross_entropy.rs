//! Weighted cross-entropy: `Σ_i weight_i · (log Σ_j e^{x_ij} - x_{i,target_i})`.

use super::{
    simd::{self, Real, multiversion},
    slices::{by_dtype, slice, storage, tensor, view},
};
use crate::error::{Result, ensure};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType, backend::BackendStorage};
use rayon::prelude::*;

/// The scalar sum of `weights · nll` for `logits: (rows, vocabulary)`, `targets: (rows)` of `u32` and
/// `weights: (rows)` of `f32`; differentiable in the logits.
///
/// # Errors
/// A target lies outside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (rows, vocabulary) = logits.dims2()?;
    let (target_ids, weight_values) = (targets.to_vec1::<u32>()?, weights.to_vec1::<f32>()?);
    ensure!(target_ids.len() == rows && weight_values.len() == rows, "{rows} rows of logits need as many targets");
    let outside = target_ids.iter().find(|t| **t as usize >= vocabulary);
    ensure!(outside.is_none(), "target {} of a vocabulary of {vocabulary}", outside.copied().unwrap_or(0));
    if !logits.device().is_cpu() {
        return composed(logits, targets, weights);
    }
    let op = CrossEntropy { targets: target_ids, weights: weight_values };
    Ok(logits.contiguous()?.apply_op1(op)?)
}

/// The same from stock candle ops.
pub(crate) fn composed(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
    let log_p = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)?;
    let nll = log_p.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?;
    Ok((nll * weights.to_dtype(logits.dtype())?)?.sum_all()?)
}

struct CrossEntropy {
    targets: Vec<u32>,
    weights: Vec<f32>,
}

/// Largest logit and `Σ_j e^{x_j - largest}` of a row.
#[inline(always)]
fn partition<T: Real>(x: &[T]) -> (T, T) {
    let mut largest = x[0];
    for x in x {
        largest = if *x > largest { *x } else { largest };
    }
    let mut lanes = [T::ZERO; simd::LANES];
    for chunk in x.chunks(simd::LANES) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += (*x - largest).exp();
        }
    }
    (largest, simd::sum(&lanes))
}

multiversion! {
    fn nll<T: Real, const FMA: bool>(x: &[T], target: usize) -> T {
        let (largest, sum) = partition(x);
        sum.ln() + largest - x[target]
    }
}

multiversion! {
    fn gradient<T: Real, const FMA: bool>(x: &[T], target: usize, scale: T, dx: &mut [T]) {
        let (largest, sum) = partition(x);
        let factor = scale / sum;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = (*x - largest).exp() * factor;
        }
        dx[target] -= scale;
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, vocabulary) = layout.shape().dims2()?;
        by_dtype!(x.dtype(), "cross entropy", T => {
            let rows = slice::<T>(x, layout)?.par_chunks_exact(vocabulary).zip(&self.targets).zip(&self.weights);
            let losses: Vec<f64> = rows.map(|((x, t), w)| nll(x, *t as usize).to_f64() * f64::from(*w)).collect();
            storage(vec![T::from_f64(losses.iter().sum())], ())
        })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (_, vocabulary) = x.dims2()?;
        by_dtype!(x.dtype(), "cross entropy", T => {
            let (xs, scale) = (view::<T>(x)?, dy.to_scalar::<T>()?);
            let mut dx = vec![T::ZERO; xs.len()];
            let inputs = xs.par_chunks_exact(vocabulary).zip(&self.targets).zip(&self.weights);
            dx.par_chunks_exact_mut(vocabulary).zip(inputs).for_each(|(dx, ((x, t), w))| {
                gradient(x, *t as usize, scale * T::from_f64(f64::from(*w)), dx);
            });
            Ok(Some(tensor(dx, x.shape())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{DType, Device};

    fn targets_and_weights(rows: usize, vocabulary: usize) -> Result<(Tensor, Tensor)> {
        let targets: Vec<u32> = (0..rows).map(|i| (i * 5 % vocabulary) as u32).collect();
        let weights: Vec<f32> = (0..rows).map(|i| (i % 3) as f32 * 0.5).collect();
        Ok((Tensor::new(targets, &Device::Cpu)?, Tensor::new(weights, &Device::Cpu)?))
    }

    #[test]
    fn equals_composed_and_finite_differences_on_any_thread() -> Result<()> {
        for (rows, vocabulary) in [(1, 1), (7, 5), (40, 300)] {
            let (t, w) = targets_and_weights(rows, vocabulary)?;
            let logits = [normal("logits", &[rows, vocabulary], DType::F32)];
            assert_same(&logits, 2e-5, &|x| cross_entropy(&x[0], &t, &w), &|x| composed(&x[0], &t, &w))?;
            assert_thread_independent(&logits, &|x| cross_entropy(&x[0], &t, &w))?;
        }
        let (t, w) = targets_and_weights(4, 6)?;
        assert_gradients(&[normal("logits", &[4, 6], DType::F64)], &|x| cross_entropy(&x[0], &t, &w))
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_an_error() -> Result<()> {
        let (t, w) = targets_and_weights(4, 6)?;
        assert!(cross_entropy(&normal("x", &[4, 6], DType::F32), &t, &w).is_ok());
        assert!(cross_entropy(&normal("x", &[4, 5], DType::F32), &t, &w).is_err());
        Ok(())
    }
}
