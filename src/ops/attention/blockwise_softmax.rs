//! The softmax of blockwise attention, by stock ops or a kernel of ours, and its gradient.

use super::{grouping::HIDDEN, softmax_cuda};
use crate::{
    ops::{cuda, slices::is_half},
    runtime::Kernels,
};
use candle_core::{D, DType, Result, Tensor};

/// Softmax of the scores plus the bias over the last dimension, computed in f32 and returned in the type of the scores. If
/// `has_empty`, rows in which everything is hidden become zero.
pub fn softmax(kernels: Kernels, scores: &Tensor, bias: Option<&Tensor>, has_empty: bool) -> Result<Tensor> {
    if cuda::takes(kernels, &[scores])
        && let Some(weights) = softmax_cuda::softmax(scores, bias, HIDDEN / 2.0)?
    {
        return Ok(weights);
    }
    stock_softmax(scores, bias, has_empty)
}

/// The gradient of the scores, y · (dy − Σ y · dy).
pub fn softmax_backward(kernels: Kernels, y: &Tensor, dy: Tensor) -> Result<Tensor> {
    if cuda::takes(kernels, &[y, &dy]) {
        return softmax_cuda::backward(y, &dy);
    }
    let wide = if is_half(y.dtype()) { DType::F32 } else { y.dtype() };
    let (weights, wide_dy) = (y.to_dtype(wide)?, dy.to_dtype(wide)?);
    drop(dy);
    let sums = (&weights * &wide_dy)?.sum_keepdim(D::Minus1)?;
    let centred = wide_dy.broadcast_sub(&sums)?;
    drop(wide_dy);
    (weights * centred)?.to_dtype(y.dtype())
}

/// [`softmax`] from stock candle ops.
pub fn stock_softmax(scores: &Tensor, bias: Option<&Tensor>, has_empty: bool) -> Result<Tensor> {
    let (dtype, wide) = (scores.dtype(), if scores.dtype() == DType::F64 { DType::F64 } else { DType::F32 });
    let bias = bias.map(|bias| bias.to_dtype(wide)).transpose()?;
    // Each tensor replaces the one before, so that only two of the size of the scores are held.
    let mut x = scores.to_dtype(wide)?;
    if let Some(bias) = &bias {
        x = x.broadcast_add(bias)?;
    }
    let largest = x.max_keepdim(D::Minus1)?.detach();
    x = x.broadcast_sub(&largest)?;
    x = x.exp()?;
    let sums = x.sum_keepdim(D::Minus1)?;
    x = x.broadcast_div(&sums)?;
    if let Some(bias) = bias.filter(|_| has_empty) {
        let visible = bias.max_keepdim(D::Minus1)?.gt(f64::from(HIDDEN) / 2.0)?;
        x = x.broadcast_mul(&visible.to_dtype(wide)?)?;
    }
    x.to_dtype(dtype)
}
