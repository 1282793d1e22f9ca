//! Convolution over `(batch, height, width, channels)`; the weight keeps PyTorch's `(out, in, k, k)`.

use super::params::{Init, Scope};
use crate::{
    error::Result,
    ops::{self, conv::Padding},
};
use candle_core::Tensor;

/// A square convolution with bias.
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: Padding,
}

impl Conv2d {
    /// Stride 1 and as much padding as keeps the size; `kernel` is odd.
    pub fn same(scope: &Scope, inputs: usize, outputs: usize, kernel: usize) -> Result<Self> {
        let pad = kernel / 2;
        let padding = Padding { top: pad, bottom: pad, left: pad, right: pad };
        Self::new(scope, inputs, outputs, kernel, 1, padding)
    }

    /// taming's downsampling: 3×3, stride 2, one zero row below and one zero column to the right.
    pub fn down(scope: &Scope, channels: usize) -> Result<Self> {
        Self::new(scope, channels, channels, 3, 2, Padding { top: 0, bottom: 1, left: 0, right: 1 })
    }

    fn new(
        scope: &Scope,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: Padding,
    ) -> Result<Self> {
        // PyTorch's default for convolutions.
        let init = Init::Uniform(((inputs * kernel * kernel) as f64).powf(-0.5));
        let weight = scope.get("weight", (outputs, inputs, kernel, kernel), init)?;
        Ok(Self { weight, bias: scope.get("bias", outputs, init)?, stride, padding })
    }

    /// `(batch, height, width, in)` → `(batch, height / stride, width / stride, out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, Some(&self.bias), self.stride, self.padding)
    }
}
