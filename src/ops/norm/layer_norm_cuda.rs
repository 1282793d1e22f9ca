//! Layer normalization by the kernels of layer_norm.cu.

use crate::ops::cuda::{Call, Output, row_blocks, run};
use candle_core::{DType, Result, Tensor, bail};

/// The channels whose sums fit into the shared memory of a block (48 KB).
pub const MAX_CHANNELS: usize = 6144;

/// As [`layer_norm`](super::layer_norm()), for x that [`takes`](crate::ops::cuda::takes) accepts; weight and bias are f32.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let channels = weight.elem_count();
    if channels > MAX_CHANNELS || x.dims().last() != Some(&channels) || bias.dims() != weight.dims() {
        bail!("layer norm: the shapes {:?}, {:?} and {:?} do not match", x.dims(), weight.dims(), bias.dims());
    }
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    let rows = x.elem_count() / channels;
    let [y] = run(&[&x, &weight, &bias], [Output::new(x.shape(), x.dtype())], &|from, to| {
        let call = Call::new("layer_norm_forward", &[x.dtype()], [rows, 1], threads(channels));
        vec![from.iter().chain(to).fold(call, |call, &address| call.with(address)).with(channels).with(eps as f32)]
    })?;
    y.differentiable("layer norm", &[&x, &weight, &bias], move |args, _, dy| match args {
        [x, weight, _] => backward(x, weight, dy, eps),
        _ => bail!("layer norm: {} arguments", args.len()),
    })
}

/// dx, dweight and dbias.
fn backward(x: &Tensor, weight: &Tensor, dy: &Tensor, eps: f64) -> Result<Vec<Tensor>> {
    let channels = weight.elem_count();
    let rows = x.elem_count() / channels;
    let (rows_per_block, blocks) = row_blocks(rows);
    let outputs = [
        Output::new(x.shape(), x.dtype()),
        Output::new((blocks, 2 * channels), DType::F32),
        Output::new((2, channels), DType::F32),
    ];
    let [dx, _, sums] = run(&[x, weight, dy], outputs, &|from, to| {
        let call = Call::new("layer_norm_backward", &[x.dtype()], [blocks, 1], threads(channels));
        let call = from.iter().chain(&to[..2]).fold(call, |call, &address| call.with(address));
        let call = call.with(rows).with(channels).with(rows_per_block).with(eps as f32);
        vec![
            call.with_shared(2 * channels * size_of::<f32>()),
            Call::column_sums(DType::F32, to[1], to[2], [blocks, 2 * channels]),
        ]
    })?;
    let sums = sums.tensor();
    Ok(vec![dx.tensor(), sums.get(0)?, sums.get(1)?])
}

/// Threads of the block of a row: a warp for the norms of heads, several for hidden states.
fn threads(channels: usize) -> usize {
    match channels {
        0..=256 => 32,
        257..=1024 => 128,
        _ => 256,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::{cuda::emulator, norm::layer_norm::composed, testing::*},
    };

    #[test]
    fn equals_stock_ops() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        // Widths of one warp and of several; rows of one block, and of more blocks than the sum of columns has warps.
        for shape in [&[1, 1][..], &[2, 3, 33], &[200, 5], &[37, 64], &[3, 300], &[2, 1100]] {
            let channels = &shape[shape.len() - 1..];
            let vars = |dtype| {
                [normal("x", shape, dtype), normal("w", channels, DType::F32), normal("b", channels, DType::F32)]
            };
            let fused = |v: &[Tensor]| Ok(layer_norm(&v[0], &v[1], &v[2], 1e-5)?);
            let stock = |v: &[Tensor]| composed(&v[0], &v[1], &v[2], 1e-5);
            assert_same(&vars(DType::F32), 2e-5, &fused, &stock)?;
            // Stock ops in f32, of the same numbers.
            let wide = |v: &[Tensor]| {
                let v = v.iter().map(|x| x.to_dtype(DType::F32)).collect::<candle_core::Result<Vec<_>>>()?;
                Ok(stock(&v)?.to_dtype(DType::BF16)?)
            };
            assert_same(&vars(DType::BF16), 1e-2, &fused, &wide)?;
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_match_are_errors() {
        let x = normal("x", &[2, 3], DType::F32);
        let (three, four) = (normal("w", &[3], DType::F32), normal("w", &[4], DType::F32));
        assert!(layer_norm(&x, &four, &four, 1e-5).is_err() && layer_norm(&x, &three, &four, 1e-5).is_err());
    }
}
