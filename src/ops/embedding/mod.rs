//! Rows of a table by their numbers: token embeddings. Only CUDA has kernels of ours; the CPU's manual segments use
//! [`scatter_add`](super::scatter::scatter_add) for the gradient.

pub mod embedding_cuda;

use crate::{
    error::Result,
    ops::cuda,
    runtime::{self, Kernels},
};
use candle_core::Tensor;

/// `table (rows, hidden)`, `ids (..)` u32 → `(.., hidden)`.
///
/// # Errors
/// An id is outside the table (on CUDA with `--kernels fused`, its row is not a number instead).
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    by(runtime::kernels(), table, ids)
}

/// [`embedding()`] by stock ops or by kernels of ours.
pub(crate) fn by(kernels: Kernels, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let flat = ids.contiguous()?.flatten_all()?;
    let rows = if cuda::takes(kernels, &[table]) && flat.elem_count() > 0 {
        embedding_cuda::embedding(table, &flat)?
    } else {
        table.index_select(&flat, 0)?
    };
    Ok(rows.reshape([ids.dims(), &[table.dim(1)?]].concat())?)
}
