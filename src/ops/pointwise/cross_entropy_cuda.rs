//! Weighted cross-entropy by the kernels of cross_entropy.cu.

use crate::ops::cuda::{Call, Output, run};
use candle_core::{DType, Result, Tensor, bail};

/// Threads of the block of a row.
const THREADS: usize = 256;

/// As [`cross_entropy`](super::cross_entropy()), for logits that [`takes`](crate::ops::cuda::takes) accepts; the loss is f32. That
/// of a target outside of the vocabulary is not a number: the host does not read the targets.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (rows, vocabulary) = logits.dims2()?;
    if targets.dims() != [rows] || weights.dims() != [rows] || targets.dtype() != DType::U32 {
        bail!("cross-entropy: {rows} rows, targets {:?}, weights {:?}", targets.dims(), weights.dims());
    }
    let (logits, targets) = (logits.contiguous()?, targets.contiguous()?);
    let weights = weights.to_dtype(DType::F32)?.contiguous()?.detach();
    let dtype = logits.dtype();
    let outputs = [Output::new((rows, 2), DType::F32), Output::new(rows, DType::F32), Output::new((), DType::F32)];
    let [statistics, _, total] = run(&[&logits, &targets, &weights], outputs, &|from, to| {
        let call = Call::new("cross_entropy_forward", &[dtype], [rows, 1], THREADS);
        let call = from.iter().chain(&to[..2]).fold(call, |call, &address| call.with(address));
        let total = Call::new("cross_entropy_total", &[], [1, 1], THREADS);
        vec![call.with(vocabulary), total.with(to[1]).with(to[2]).with(rows)]
    })?;
    let statistics = statistics.tensor();
    total.differentiable("cross-entropy", &[&logits], move |args, _, gradient| {
        let inputs = [args[0], &targets, &weights, &statistics, gradient];
        let [dlogits] = run(&inputs, [Output::new((rows, vocabulary), dtype)], &|from, to| {
            let call = Call::new("cross_entropy_backward", &[dtype], [rows, 1], THREADS);
            vec![from.iter().chain(to).fold(call, |call, &address| call.with(address)).with(vocabulary)]
        })?;
        Ok(vec![dlogits.tensor()])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::{cuda::emulator, pointwise::cross_entropy::composed, testing::*},
    };
    use candle_core::Device;

    fn case(rows: usize, vocabulary: usize) -> Result<(Tensor, Tensor)> {
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % vocabulary) as u32).collect();
        let weights: Vec<f32> = (0..rows).map(|i| [0.5, 0.0, 2.0][i % 3]).collect();
        Ok((Tensor::new(targets, &Device::Cpu)?, Tensor::new(weights, &Device::Cpu)?))
    }

    #[test]
    fn equals_stock_ops() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        for (rows, vocabulary) in [(1, 1), (1, 9), (7, 33), (300, 5), (4, 1000)] {
            let (targets, weights) = case(rows, vocabulary)?;
            let fused = |v: &[Tensor]| Ok((cross_entropy(&v[0], &targets, &weights)? * 3.0)?);
            let stock = |v: &[Tensor]| Ok((composed(&v[0], &targets, &weights)? * 3.0)?);
            assert_same(&[normal("logits", &[rows, vocabulary], DType::F32)], 1e-5, &fused, &stock)?;
            let wide = |v: &[Tensor]| stock(&[v[0].to_dtype(DType::F32)?]);
            assert_same(&[normal("logits", &[rows, vocabulary], DType::BF16)], 2e-2, &fused, &wide)?;
        }
        Ok(())
    }

    #[test]
    fn large_logits_do_not_overflow_and_wrong_targets_give_no_number() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        let logits = Tensor::new(&[[1000f32, 990.0, -1e30], [-1000.0, -1000.0, -1000.0]], &Device::Cpu)?;
        let weights = Tensor::new(&[1f32, 1.0], &Device::Cpu)?;
        let loss = |targets: [u32; 2]| -> Result<f32> {
            Ok(cross_entropy(&logits, &Tensor::new(&targets, &Device::Cpu)?, &weights)?.to_scalar()?)
        };
        let found = loss([1, 2])?;
        assert!((found - (10.000_045 + 1.098_612_3)).abs() < 1e-5, "{found}");
        // In the first row, behind which there are logits, and in the last.
        assert!(loss([3, 2])?.is_nan() && loss([1, 3])?.is_nan());
        assert!(cross_entropy(&logits, &Tensor::new(&[1u32], &Device::Cpu)?, &weights).is_err());
        Ok(())
    }
}
