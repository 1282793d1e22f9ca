//! Gradients that are not those of the values: scaled ones, and straight-through ones (arXiv 1308.3432).

use crate::error::Result;
use candle_core::Tensor;

/// `x`, whose gradient is `scale` times that of the result.
pub fn with_gradient_scale(x: &Tensor, scale: f64) -> Result<Tensor> {
    let fixed = x.detach();
    // The difference is exactly 0, so that the values stay.
    Ok(if scale == 1.0 { x.clone() } else { (((x - &fixed)? * scale)? + fixed)? })
}

/// The embeddings `hard` (b, n, hidden) of codes, the rows of `table` (codes, hidden). Soft codes (b, n, codes) get the
/// gradient that they would have if the embeddings were soft · table; table and `hard` keep theirs.
pub fn straight_through(hard: &Tensor, soft: &Tensor, table: &Tensor) -> Result<Tensor> {
    let (b, n, codes) = soft.dims3()?;
    let mean = soft.reshape((b * n, codes))?.matmul(&table.detach())?.reshape(hard.shape())?;
    Ok((hard + (&mean - mean.detach())?)?)
}
