//! The linear layer from stock candle ops: for devices other than the CPU, and as the reference.

use crate::{error::Result, ops::custom_gradient::custom_gradient};
use candle_core::{DType, Tensor};

/// `x (.., in)`, `w (out, in)`, `b (out)` → `(.., out)`, with factors of the type `factor` and the bias and output in the
/// type `output`.
pub(crate) fn on_device(x: &Tensor, w: &Tensor, b: Option<&Tensor>, [factor, output]: [DType; 2]) -> Result<Tensor> {
    let forward = |args: &[Tensor]| {
        let y = composed(&args[0].to_dtype(factor)?, &args[1].to_dtype(factor)?, None)?.to_dtype(output)?;
        Ok(match args.get(2) {
            Some(b) => y.broadcast_add(&b.to_dtype(output)?)?,
            None => y,
        })
    };
    let args: Vec<&Tensor> = [x, w].into_iter().chain(b).collect();
    custom_gradient("linear", &args, forward, move |args, _, dy| backward(args, dy, factor))
}

/// The gradients of x, w and, where there is one, b; the products are in the type `factor`.
fn backward(args: &[&Tensor], dy: &Tensor, factor: DType) -> candle_core::Result<Vec<Tensor>> {
    let (x, w) = (args[0], args[1]);
    let (outputs, inputs) = w.dims2()?;
    let dy = dy.reshape(((), outputs))?;
    let rounded = dy.to_dtype(factor)?;
    let dx = rounded.matmul(&w.to_dtype(factor)?)?.reshape(x.shape())?.to_dtype(x.dtype())?;
    let dw = rounded.t()?.matmul(&x.to_dtype(factor)?.reshape(((), inputs))?)?.to_dtype(w.dtype())?;
    let mut gradients = vec![dx, dw];
    if let Some(b) = args.get(2) {
        // A product sums in f32 also in half precision.
        let ones = Tensor::ones((1, dy.dim(0)?), dy.dtype(), dy.device())?;
        gradients.push(ones.matmul(&dy)?.reshape(b.shape())?.to_dtype(b.dtype())?);
    }
    Ok(gradients)
}

/// The same without casts and with the gradients of candle's autograd.
pub(crate) fn composed(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = w.dims2()?;
    let rows = x.elem_count() / inputs;
    let mut y = x.reshape((rows, inputs))?.matmul(&w.t()?)?;
    if let Some(b) = b {
        y = y.broadcast_add(b)?;
    }
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    Ok(y.reshape(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn vars(x: &[usize], outputs: usize, dtype: DType) -> [candle_core::Var; 3] {
        let inputs = x[x.len() - 1];
        [normal("x", x, dtype), normal("w", &[outputs, inputs], dtype), normal("b", &[outputs], dtype)]
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let vars = vars(&[3, 2, 5], 4, DType::F64);
        let device = |v: &[Tensor]| on_device(&v[0], &v[1], v.get(2), [DType::F64; 2]);
        assert_gradients(&vars, &device)?;
        assert_gradients(&vars[..2], &device)
    }

    #[test]
    fn gradients_equal_those_of_autograd() -> Result<()> {
        for (factor, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-3)] {
            let device = |v: &[Tensor]| on_device(&v[0], &v[1], Some(&v[2]), [factor, DType::F32]);
            let recorded = |v: &[Tensor]| {
                let y = composed(&v[0].to_dtype(factor)?, &v[1].to_dtype(factor)?, None)?;
                Ok(y.to_dtype(DType::F32)?.broadcast_add(&v[2])?)
            };
            assert_same(&vars(&[2, 9, 33], 7, DType::F32), tolerance, &device, &recorded)?;
        }
        Ok(())
    }
}
