//! Attention with a full mask: the reference for the block and the cached implementation.
//!
//! One contract, three implementations: this one (n×n scores, stock candle ops),
//! [`ops::attention`](fn@crate::ops::attention) (training: only the keys a pattern lists) and
//! [`Cache`](super::cache::Cache) (decoding: only the keys a pattern can still need).

use crate::error::Result;
use candle_core::{D, Tensor};

/// Softmax of the scores over the last dimension where `mask` (u8) is 1. A row without any 1 becomes zero.
pub fn masked_softmax(scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mask = mask.broadcast_as(scores.shape())?;
    let hidden = Tensor::full(-1e30f32, scores.shape(), scores.device())?.to_dtype(scores.dtype())?;
    let scores = mask.where_cond(scores, &hidden)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = (weights * mask.to_dtype(scores.dtype())?)?;
    let sums = weights.sum_keepdim(D::Minus1)?.maximum(f64::from(f32::MIN_POSITIVE))?;
    Ok(weights.broadcast_div(&sums)?)
}

/// `qkv` (b, l, 3, heads, d), `mask` (b or 1, l, l) with 1 where a query attends to a key → (b, l, heads·d).
pub fn dense_masked(qkv: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (b, l, _, heads, d) = qkv.dims5()?;
    let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.t()?)? * (d as f64).powf(-0.5))?;
    let weights = masked_softmax(&scores, &mask.unsqueeze(1)?)?;
    Ok(weights.matmul(&v)?.transpose(1, 2)?.reshape((b, l, heads * d))?)
}
