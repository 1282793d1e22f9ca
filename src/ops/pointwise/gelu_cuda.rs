//! GELU, with the bias of the layer before it, by the kernels of gelu.cu.

use crate::ops::cuda::{Address, Call, Output, row_blocks, run};
use candle_core::{DType, Result, Tensor, bail};

/// Threads of a block, each with one column.
const THREADS: usize = 256;

/// `gelu(x)`, for a tensor that [`takes`](crate::ops::cuda::takes) accepts.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let sizes = sizes(&x);
    let [y] = run(&[&x], [Output::new(x.shape(), x.dtype())], &|from, to| {
        vec![forward([x.dtype(); 2], [from[0], Address::NULL, to[0]], sizes)]
    })?;
    y.differentiable("gelu", &[&x], move |args, _, dy| {
        let [dx] = run(&[args[0], dy], [Output::new(args[0].shape(), dy.dtype())], &|from, to| {
            vec![backward([dy.dtype(); 2], [from[0], Address::NULL, from[1], to[0], Address::NULL], sizes)]
        })?;
        Ok(vec![dx.tensor()])
    })
}

/// `gelu(x + bias)` of `x (.., columns)` and `bias (columns)`, in the type of the bias: f32, or bf16 for x in bf16.
pub fn bias_gelu(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (x, bias) = (x.contiguous()?, bias.contiguous()?);
    let (sizes, types) = (sizes(&x), [x.dtype(), bias.dtype()]);
    if bias.dims() != [sizes[1]] || !matches!(types, [DType::BF16, _] | [DType::F32, DType::F32]) {
        bail!("bias and gelu: {:?} {:?} and {:?} {:?} do not match", types[0], x.dims(), types[1], bias.dims());
    }
    let [y] = run(&[&x, &bias], [Output::new(x.shape(), bias.dtype())], &|from, to| {
        vec![forward(types, [from[0], from[1], to[0]], sizes)]
    })?;
    y.differentiable("bias and gelu", &[&x, &bias], move |args, _, dy| {
        let [x, bias] = args else { bail!("bias and gelu: {} arguments", args.len()) };
        let (blocks, columns) = (row_blocks(sizes[0]).1, sizes[1]);
        let outputs = [
            Output::new(x.shape(), x.dtype()),
            Output::new((blocks, columns), DType::F32),
            Output::new(columns, bias.dtype()),
        ];
        let [dx, _, dbias] = run(&[x, bias, dy], outputs, &|from, to| {
            vec![
                backward(types, [from[0], from[1], from[2], to[0], to[1]], sizes),
                Call::column_sums(bias.dtype(), to[1], to[2], [blocks, columns]),
            ]
        })?;
        Ok(vec![dx.tensor(), dbias.tensor()])
    })
}

/// Rows and columns.
fn sizes(x: &Tensor) -> [usize; 2] {
    let columns = x.dims().last().copied().unwrap_or(1);
    [x.elem_count() / columns.max(1), columns]
}

/// x, bias, y.
fn forward(types: [DType; 2], args: [Address; 3], sizes: [usize; 2]) -> Call {
    call("bias_gelu_forward", types, &args, sizes)
}

/// x, bias, dy, dx, partial sums of dbias.
fn backward(types: [DType; 2], args: [Address; 5], sizes: [usize; 2]) -> Call {
    call("bias_gelu_backward", types, &args, sizes)
}

fn call(name: &str, types: [DType; 2], args: &[Address], [rows, columns]: [usize; 2]) -> Call {
    let (rows_per_block, blocks) = row_blocks(rows);
    let call = Call::new(name, &types, [columns.div_ceil(THREADS), blocks], THREADS);
    let call = args.iter().fold(call, |call, &address| call.with(address));
    call.with(rows).with(columns).with(rows_per_block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::{cuda::emulator, pointwise::gelu::composed, testing::*},
    };

    const SHAPES: [&[usize]; 4] = [&[1], &[3, 5, 17], &[35, 300], &[2, 513]];

    #[test]
    fn gelu_equals_stock_ops() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        for shape in SHAPES {
            let x = [normal("x", shape, DType::F32)];
            // Stock ops lose digits in 1 + tanh(u).
            assert_same(&x, 1e-5, &|v| Ok(gelu(&v[0])?), &|v| composed(&v[0]))?;
            let wide = |v: &[Tensor]| Ok(composed(&v[0].to_dtype(DType::F32)?)?.to_dtype(DType::BF16)?);
            assert_same(&[normal("x", shape, DType::BF16)], 1e-2, &|v| Ok(gelu(&v[0])?), &wide)?;
        }
        Ok(())
    }

    /// A product in bf16 with bias and result in f32, as in the layers of a block, and both in one type.
    #[test]
    fn bias_and_gelu_equal_stock_ops() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        let fused = |v: &[Tensor]| Ok(bias_gelu(&v[0], &v[1])?);
        for shape in SHAPES {
            for (x, bias, tolerance) in
                [(DType::F32, DType::F32, 1e-5), (DType::BF16, DType::F32, 1e-2), (DType::BF16, DType::BF16, 1e-2)]
            {
                let vars = [normal("x", shape, x), normal("bias", &shape[shape.len() - 1..], bias)];
                let stock = |v: &[Tensor]| {
                    let [x, bias] = [v[0].to_dtype(DType::F32)?, v[1].to_dtype(DType::F32)?];
                    Ok(composed(&x.broadcast_add(&bias)?)?.to_dtype(v[1].dtype())?)
                };
                assert_same(&vars, tolerance, &fused, &stock)?;
            }
        }
        let x = normal("x", &[2, 3], DType::F32);
        assert!(bias_gelu(&x, &normal("bias", &[2], DType::F32)).is_err());
        assert!(bias_gelu(&x, &normal("bias", &[3], DType::BF16)).is_err());
        Ok(())
    }

    #[test]
    fn large_inputs_give_themselves_or_zero() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        let x = candle_core::Var::new(&[-1e4f32, -30.0, 30.0, 1e4, f32::NAN], &candle_core::Device::Cpu)?;
        let y = gelu(&x)?;
        let dx = values(y.sum_all()?.backward()?.get(&x).expect("a gradient"));
        let y = values(&y);
        assert!(y[0].abs() < 1e-30 && y[1].abs() < 1e-30 && y[2..4] == [30.0, 1e4] && y[4].is_nan(), "{y:?}");
        assert!(dx[0].abs() < 1e-20 && dx[1].abs() < 1e-20 && dx[2..4] == [1.0, 1.0] && dx[4].is_nan(), "{dx:?}");
        Ok(())
    }
}
