//! The softmax of blockwise attention by the kernels of softmax.cu.

use crate::ops::cuda::{Address, Call, Output, run};
use candle_core::{Result, Tensor};

/// Warps of a block, each with a row.
const WARPS: usize = 4;

/// Softmax of `scores (b, heads, .., keys)` plus `bias`, f32 and of the same rank, over the last dimension. A row in which no
/// bias is above `hidden` becomes zero. `None`: the kernel has no such bias (see [`bias_rows`]).
///
/// # Errors
/// The device is out of memory.
pub fn softmax(scores: &Tensor, bias: Option<&Tensor>, hidden: f32) -> Result<Option<Tensor>> {
    let layout = bias.map(|bias| bias_rows(scores.dims(), bias.dims()));
    let Some([bias_rows, bias_step]) = layout.unwrap_or(Some([1, 0])) else { return Ok(None) };
    let (scores, bias) = (scores.contiguous()?, bias.map(|bias| bias.detach().contiguous()).transpose()?);
    let (samples, keys) = (scores.dim(0)?, scores.dims().last().copied().unwrap_or(1));
    let (rows, dtype) = (scores.elem_count() / keys, scores.dtype());
    let inputs: Vec<&Tensor> = [&scores].into_iter().chain(&bias).collect();
    let [y] = run(&inputs, [Output::new(scores.shape(), dtype)], &|from, to| {
        let call = call("softmax_forward", &scores, rows);
        let call = call.with(from[0]).with(from.get(1).copied().unwrap_or(Address::NULL)).with(to[0]);
        vec![call.with(rows).with(keys).with(rows / samples).with(bias_rows).with(bias_step).with(hidden)]
    })?;
    Ok(Some(y.tensor()))
}

/// The gradient of the scores, from the softmax and its gradient.
///
/// # Errors
/// The device is out of memory.
pub fn backward(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let dy = dy.contiguous()?;
    let keys = y.dims().last().copied().unwrap_or(1);
    let rows = y.elem_count() / keys;
    let [dx] = run(&[y, &dy], [Output::new(y.shape(), y.dtype())], &|from, to| {
        let call = call("softmax_backward", y, rows);
        vec![from.iter().chain(to).fold(call, |call, &address| call.with(address)).with(rows).with(keys)]
    })?;
    Ok(dx.tensor())
}

fn call(name: &str, rows_of: &Tensor, rows: usize) -> Call {
    Call::new(name, &[rows_of.dtype()], [rows.div_ceil(WARPS), 1], 32 * WARPS)
}

/// Rows of the bias in a sample, and rows from one sample's bias to the next one's. `None`: its shape is neither (b or 1, 1, ..,
/// keys) with the queries of the scores, nor the same with one row for all queries.
fn bias_rows(scores: &[usize], bias: &[usize]) -> Option<[usize; 2]> {
    let ([b, _, queries @ .., keys], [samples, 1, rows @ .., bias_keys]) = (scores, bias) else { return None };
    let one = rows.iter().all(|size| *size == 1);
    if keys != bias_keys || rows.len() != queries.len() || !(one || rows == queries) || !(samples == b || *samples == 1)
    {
        return None;
    }
    let rows = rows.iter().product();
    Some([rows, if *samples > 1 { rows } else { 0 }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::{Context, Result},
        ops::{
            attention::blockwise_softmax::stock_softmax, cuda::emulator, custom_gradient::custom_gradient, testing::*,
        },
    };
    use candle_core::{DType, Device};

    #[test]
    fn biases_are_found_by_sample_and_query() {
        for (scores, bias, expected) in [
            (&[3, 2, 5, 7][..], &[1, 1, 5, 7][..], Some([5, 0])),
            (&[3, 2, 5, 7], &[3, 1, 5, 7], Some([5, 5])),
            (&[3, 2, 4, 5, 7], &[3, 1, 4, 5, 7], Some([20, 20])),
            (&[3, 2, 4, 5, 7], &[3, 1, 1, 1, 7], Some([1, 1])),
            (&[1, 2, 1, 7], &[1, 1, 1, 7], Some([1, 0])),
            (&[3, 2, 4, 5, 7], &[3, 1, 1, 5, 7], None),
            (&[3, 2, 5, 7], &[3, 2, 5, 7], None),
            (&[3, 2, 5, 7], &[2, 1, 5, 7], None),
            (&[3, 2, 5, 7], &[3, 1, 5, 1], None),
        ] {
            assert_eq!(bias_rows(scores, bias), expected, "{scores:?} {bias:?}");
        }
    }

    /// Hides about a third of the keys, and all keys of every fifth row.
    fn bias(shape: &[usize]) -> Result<Tensor> {
        let keys = shape[shape.len() - 1];
        let hides = |i: usize| i / keys % 5 == 3 || i * i % 3 == 1;
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| if hides(i) { -1e30 } else { 0.25 }).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    #[test]
    fn equals_stock_ops() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        for (shape, biased) in [
            (&[1, 1, 1, 1][..], None),
            (&[3, 2, 5, 7], Some(&[3, 1, 5, 7][..])),
            (&[2, 3, 6, 33], Some(&[1, 1, 6, 33])),
            (&[2, 2, 3, 2, 97], Some(&[2, 1, 3, 2, 97])),
            (&[2, 2, 3, 2, 40], Some(&[2, 1, 1, 1, 40])),
        ] {
            let bias = biased.map(bias).transpose()?;
            let fused = |v: &[Tensor]| {
                let bias = bias.clone();
                let forward = |v: &[Tensor]| softmax(&v[0], bias.as_ref(), -5e29)?.context("a bias of the kernel");
                custom_gradient("softmax", &[&v[0]], forward, |_, y, dy| Ok(vec![backward(y, dy)?]))
            };
            let stock = |v: &[Tensor]| Ok(stock_softmax(&v[0], bias.as_ref(), true)?);
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 2e-2)] {
                assert_same(&[normal("scores", shape, dtype)], tolerance, &fused, &stock)
                    .map_err(|e| e.context(format!("{shape:?}")))?;
            }
        }
        Ok(())
    }
}
