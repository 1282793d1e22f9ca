//! `activation(x·Wᵀ + b)`. On CUDA, a kernel of ours adds the bias and applies GELU in one pass over the product.

use super::{
    linear::{linear_in, matmul_weight_dtype},
    linear_on_device,
};
use crate::{
    config::{Activation, Precision},
    error::Result,
    ops::{
        cuda,
        pointwise::{
            activation::{self, activation},
            gelu_cuda,
        },
    },
    runtime::{self, Kernels},
};
use candle_core::{DType, Tensor};

/// `x (.., in)`, `w (out, in)`, `b (out)` → `(.., out)`, with the product in `precision`, as
/// [`linear_in`](super::linear_in()).
pub fn linear_activated(kind: Activation, precision: Precision, x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return on_device(runtime::kernels(), kind, precision, x, w, b);
    }
    activation(kind, &linear_in(precision, x, w, Some(b))?)
}

/// [`linear_activated()`] on other devices than CPUs.
pub(crate) fn on_device(
    kernels: Kernels,
    kind: Activation,
    precision: Precision,
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
) -> Result<Tensor> {
    let b = &b.to_dtype(x.dtype())?;
    if kind != Activation::Gelu || !cuda::takes(kernels, &[x, b]) {
        return activation::on_device(kernels, kind, &linear_in(precision, x, w, Some(b))?);
    }
    let product = match matmul_weight_dtype(precision) {
        // The kernel reads the product as it is: no cast.
        Some(DType::BF16) => linear_on_device::on_device(x, w, None, [DType::BF16; 2])?,
        _ => linear_in(precision, x, w, None)?,
    };
    Ok(gelu_cuda::bias_gelu(&product, b)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    /// On the emulator; candle's CPU has no product in bf16.
    #[test]
    fn the_kernel_equals_stock_ops() -> Result<()> {
        if !cuda::emulator::available() {
            return Ok(());
        }
        let vars =
            [normal("x", &[2, 5, 6], DType::F32), normal("w", &[9, 6], DType::F32), normal("b", &[9], DType::F32)];
        for kind in [Activation::Gelu, Activation::QuickGelu] {
            for precision in [Precision::F32, Precision::F16] {
                let by =
                    |kernels: Kernels| move |v: &[Tensor]| on_device(kernels, kind, precision, &v[0], &v[1], &v[2]);
                assert_same(&vars, 2e-5, &by(Kernels::Fused), &by(Kernels::Stock))?;
            }
        }
        Ok(())
    }
}
