//! Weighted cross-entropy of rows of logits: `Σᵢ weightᵢ · (log Σⱼ e^logitᵢⱼ − logitᵢ,targetᵢ)`.

use super::cross_entropy_cuda;
use crate::{
    error::{Result, ensure},
    ops::{
        cuda,
        custom_gradient::custom_gradient,
        simd::{self, Real, multiversion, sum},
        slices::{by_dtype, fresh, has_cpu_kernels, is_half, slice, storage, tensor, view},
    },
    runtime::{self, Kernels},
};
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Shape, Tensor, WithDType, backend::BackendStorage};
use rayon::prelude::*;
use std::sync::OnceLock;

/// `logits (rows, vocabulary)`, `targets (rows)` u32, `weights (rows)` → scalar, f32 for logits in half precision,
/// differentiable with respect to the logits. A row of weight 0 is skipped and has no gradient.
///
/// # Errors
/// Shapes do not match, or (on a CPU) a target is outside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (rows, vocabulary) = logits.dims2()?;
    ensure!(
        targets.dims() == [rows] && weights.dims() == [rows],
        "cross-entropy: {rows} rows of logits, targets {:?}, weights {:?}",
        targets.dims(),
        weights.dims()
    );
    if !has_cpu_kernels(logits) {
        return on_device(runtime::kernels(), logits, targets, weights);
    }
    let targets: Vec<u32> = targets.to_vec1()?;
    if let Some(target) = targets.iter().find(|&&t| t as usize >= vocabulary) {
        crate::error::bail!("cross-entropy: target {target} is outside the vocabulary of {vocabulary}");
    }
    let weights = weights.to_dtype(DType::F64)?.to_vec1()?;
    Ok(logits.contiguous()?.apply_op1(CrossEntropy { targets, weights, log_sums: OnceLock::new() })?)
}

/// [`cross_entropy()`] on other devices than CPUs, and for half precision.
pub(crate) fn on_device(kernels: Kernels, logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    if cuda::takes(kernels, &[logits]) {
        return Ok(cross_entropy_cuda::cross_entropy(logits, targets, weights)?);
    }
    let wide = if is_half(logits.dtype()) { DType::F32 } else { logits.dtype() };
    let forward = |args: &[Tensor]| composed(&args[0].to_dtype(wide)?, targets, weights);
    let (targets, weights) = (targets.unsqueeze(1)?, weights.to_dtype(wide)?.unsqueeze(1)?.detach());
    let backward = move |args: &[&Tensor], _: &Tensor, dy: &Tensor| {
        let scales = weights.broadcast_mul(dy)?;
        Ok(vec![composed_backward(&args[0].to_dtype(wide)?, &targets, &scales)?.to_dtype(args[0].dtype())?])
    };
    custom_gradient("cross-entropy", &[logits], forward, backward)
}

/// scale · (softmax − one-hot target) of logits (rows, vocabulary), with targets and scales (rows, 1).
fn composed_backward(logits: &Tensor, targets: &Tensor, scales: &Tensor) -> candle_core::Result<Tensor> {
    let exponentials = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
    let factors = (scales / exponentials.sum_keepdim(D::Minus1)?)?;
    exponentials.broadcast_mul(&factors)?.scatter_add(targets, &scales.neg()?, 1)
}

/// [`cross_entropy()`] from stock candle ops.
pub(crate) fn composed(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sums = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let nll = (log_sums - shifted.gather(&targets.unsqueeze(1)?, 1)?)?;
    Ok((nll.squeeze(1)? * weights.to_dtype(logits.dtype())?.detach())?.sum_all()?)
}

/// log Σⱼ e^logitᵢⱼ of each row whose weight is not 0.
pub fn log_sums<T: Real>(logits: &[T], vocabulary: usize, weights: &[f64]) -> Vec<f64> {
    let row = |(logits, &weight): (&[T], &f64)| if weight == 0.0 { 0.0 } else { log_sum_exp(logits) };
    logits.par_chunks(vocabulary.max(1)).zip(weights).with_min_len(8).map(row).collect()
}

/// dlogits = gradient · weight · (softmax − one-hot target).
pub fn backward<T: Real>(
    logits: &[T],
    vocabulary: usize,
    targets: &[u32],
    weights: &[f64],
    log_sums: &[f64],
    gradient: f64,
) -> Vec<T> {
    let row = |row: usize, d: &mut [T]| {
        let weight = weights[row];
        if weight == 0.0 {
            return d.fill(T::ZERO);
        }
        let logits = &logits[row * vocabulary..][..vocabulary];
        scaled_softmax(d, logits, log_sums[row], gradient * weight);
        d[targets[row] as usize] -= T::from_f64(gradient * weight);
    };
    let fill = |d: &mut [T]| {
        d.par_chunks_mut(vocabulary.max(1)).with_min_len(8).enumerate().for_each(|(i, d)| row(i, d));
    };
    // SAFETY: every row is written, with zeros or by `scaled_softmax`, before its target is read.
    unsafe { fresh(logits.len(), fill) }
}

/// The loss of rows of logits; overwrites the logits with their gradient.
///
/// # Panics
/// A target is outside the vocabulary (the caller must check this).
pub fn loss_and_gradient(logits: &mut [f32], vocabulary: usize, targets: &[u32], weights: &[f32]) -> f64 {
    let row = |((row, &target), &weight): ((&mut [f32], &u32), &f32)| {
        let logit = f64::from(row[target as usize]);
        let log_sum = softmax_in_place(row, f64::from(weight));
        row[target as usize] -= weight;
        f64::from(weight) * (log_sum - logit)
    };
    let rows = logits.par_chunks_mut(vocabulary.max(1)).zip(targets).zip(weights);
    let losses: Vec<f64> = rows.with_min_len(8).map(row).collect();
    losses.iter().sum()
}

multiversion! {
    /// x = scale · softmax(x); returns log Σ e^xᵢ.
    fn softmax_in_place<T: Real, const FMA: bool>(x: &mut [T], scale: f64) -> f64 {
        let max = simd::max(x);
        x.iter_mut().for_each(|x| *x = Real::exp(*x - max));
        let total = sum(x).to_f64();
        let factor = T::from_f64(scale / total);
        x.iter_mut().for_each(|x| *x *= factor);
        max.to_f64() + total.ln()
    }
}

multiversion! {
    /// log Σ e^xᵢ, in blocks that stay in cache, so that no buffer of the row's length is needed.
    fn log_sum_exp<T: Real, const FMA: bool>(x: &[T]) -> f64 {
        const BLOCK: usize = 256;
        let max = simd::max(x);
        let mut block = [T::ZERO; BLOCK];
        let mut total = T::ZERO;
        for x in x.chunks(BLOCK) {
            let block = &mut block[..x.len()];
            block.iter_mut().zip(x).for_each(|(e, &x)| *e = Real::exp(x - max));
            total += sum(block);
        }
        max.to_f64() + total.to_f64().ln()
    }
}

multiversion! {
    /// d = scale · softmax(x), shifted by the largest logit and not by the log-sum, whose rounding error matters for
    /// large logits.
    fn scaled_softmax<T: Real, const FMA: bool>(d: &mut [T], x: &[T], log_sum: f64, scale: f64) {
        let max = simd::max(x);
        let scale = T::from_f64(scale * (max.to_f64() - log_sum).exp());
        d.iter_mut().zip(x).for_each(|(d, &x)| *d = scale * Real::exp(x - max));
    }
}

struct CrossEntropy {
    targets: Vec<u32>,
    weights: Vec<f64>,
    /// Log-sum-exps of the forward pass, saved for the backward pass.
    log_sums: OnceLock<Vec<f64>>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, vocabulary) = layout.shape().dims2()?;
        by_dtype!(logits.dtype(), "cross-entropy", T => {
            let logits = slice::<T>(logits, layout)?;
            let log_sums = self.log_sums.get_or_init(|| log_sums(logits, vocabulary, &self.weights));
            let rows = logits.chunks(vocabulary.max(1)).zip(&self.targets).zip(&self.weights).zip(log_sums);
            let nll = rows.filter(|((_, weight), _)| **weight != 0.0).map(|(((logits, &target), weight), log_sum)| {
                weight * (log_sum - logits[target as usize].to_f64())
            });
            storage(vec![T::from_f64(nll.sum())], ())
        })
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (_, vocabulary) = logits.dims2()?;
        let gradient: f64 = gradient.to_dtype(DType::F64)?.to_scalar()?;
        by_dtype!(logits.dtype(), "cross-entropy", T => {
            let values = view::<T>(logits)?;
            let sums = self.log_sums.get_or_init(|| log_sums(&values, vocabulary, &self.weights));
            let d = backward(&values, vocabulary, &self.targets, &self.weights, sums, gradient);
            tensor(d, logits.shape()).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Context, ops::testing::*};
    use candle_core::{Device, Var};

    fn case(rows: usize, vocabulary: usize, dtype: DType) -> Result<(Var, Tensor, Tensor)> {
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % vocabulary) as u32).collect();
        let weights: Vec<f32> = (0..rows).map(|i| [0.5, 0.0, 2.0][i % 3]).collect();
        let (targets, weights) = (Tensor::new(targets, &Device::Cpu)?, Tensor::new(weights, &Device::Cpu)?);
        Ok((normal("logits", &[rows, vocabulary], dtype), targets, weights))
    }

    #[test]
    fn fused_equals_composed() -> Result<()> {
        for (rows, vocabulary) in [(1, 1), (1, 9), (7, 5), (40, 257), (9, 1000)] {
            let (logits, targets, weights) = case(rows, vocabulary, DType::F32)?;
            let (logits, fused) = ([logits], |v: &[Tensor]| cross_entropy(&v[0], &targets, &weights));
            at_each_level(|| assert_same(&logits, 1e-5, &fused, &|v| composed(&v[0], &targets, &weights)))?;
        }
        Ok(())
    }

    #[test]
    fn in_place_equals_fused() -> Result<()> {
        for (rows, vocabulary) in [(1, 1), (7, 5), (40, 257), (9, 1000)] {
            let (logits, targets, weights) = case(rows, vocabulary, DType::F32)?;
            at_each_level(|| {
                let loss = cross_entropy(&logits, &targets, &weights)?;
                let expected = values(loss.backward()?.get(&logits).context("a gradient")?);
                let (targets, weights) = (targets.to_vec1()?, weights.to_vec1()?);
                let mut ours = logits.flatten_all()?.to_vec1()?;
                let in_place = loss_and_gradient(&mut ours, vocabulary, &targets, &weights);
                assert!((in_place - values(&loss)[0]).abs() < 1e-5 * (1.0 + in_place.abs()));
                for (a, b) in ours.iter().zip(expected) {
                    assert!((f64::from(*a) - b).abs() < 1e-6, "{a} instead of {b}");
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let (logits, targets, weights) = case(4, 6, DType::F64)?;
        let logits = [logits];
        assert_gradients(&logits, &|v| Ok((cross_entropy(&v[0], &targets, &weights)? * 3.0)?))?;
        let device = |v: &[Tensor]| Ok((on_device(Kernels::Stock, &v[0], &targets, &weights)? * 3.0)?);
        assert_gradients(&logits, &device)
    }

    #[test]
    fn the_gradient_of_devices_equals_autograd() -> Result<()> {
        let (logits, targets, weights) = case(40, 257, DType::F32)?;
        let device = |v: &[Tensor]| on_device(Kernels::Stock, &v[0], &targets, &weights);
        assert_same(&[logits], 1e-5, &device, &|v| composed(&v[0], &targets, &weights))
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
        let (logits, targets, weights) = case(100, 300, DType::F32)?;
        assert_thread_independent(&[logits], &|v| cross_entropy(&v[0], &targets, &weights))
    }

    #[test]
    fn large_logits_do_not_overflow() -> Result<()> {
        let logits = Tensor::new(&[[1000f32, 990.0, -1e30], [-1000.0, -1000.0, -1000.0]], &Device::Cpu)?;
        let (targets, weights) = (Tensor::new(&[1u32, 2], &Device::Cpu)?, Tensor::new(&[1f32, 1.0], &Device::Cpu)?);
        let loss: f32 = cross_entropy(&logits, &targets, &weights)?.to_scalar()?;
        assert!((loss - (10.000045 + 1.0986123)).abs() < 1e-5, "{loss}");
        Ok(())
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_an_error() -> Result<()> {
        let (logits, _, weights) = case(2, 3, DType::F32)?;
        let error = cross_entropy(&logits, &Tensor::new(&[0u32, 3], &Device::Cpu)?, &weights).unwrap_err();
        assert!(error.to_string().contains("target 3"), "{error}");
        Ok(())
    }
}
