//! Convolution over `(batch, height, width, channels)`. Weights have PyTorch's shape `(out, in, k, k)`.

use super::{
    features::Features,
    gradients::Gradients,
    params::{Init, Scope},
};
use crate::{
    config::Precision,
    error::{Context, Result},
    ops::{
        self,
        conv::{self, Geometry, Padding},
        conv_upsample,
        gemm::Beta,
        linear::column_sums,
        slices::view,
    },
};
use candle_core::{DType, Tensor, Var};

/// A convolution with a square kernel and bias.
///
/// [`Conv2d::forward`] uses candle ops. The methods on [`Features`] are the manual pass: forward, the gradient of the
/// input, and the gradients of weight and bias.
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    name: String,
    stride: usize,
    padding: Padding,
    precision: Precision,
}

impl Conv2d {
    /// A convolution with stride 1 and "same" padding; `kernel` is odd.
    pub fn same(scope: &Scope, inputs: usize, outputs: usize, kernel: usize) -> Result<Self> {
        let pad = kernel / 2;
        let padding = Padding { top: pad, bottom: pad, left: pad, right: pad };
        Self::new(scope, inputs, outputs, kernel, 1, padding)
    }

    /// The downsampling of taming-transformers: 3×3, stride 2, one row of zeros below and one column of zeros to the
    /// right.
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
        // PyTorch's default initialization of convolutions.
        let init = Init::Uniform(((inputs * kernel * kernel) as f64).powf(-0.5));
        let weight = scope.get("weight", (outputs, inputs, kernel, kernel), init)?;
        let bias = scope.get("bias", outputs, init)?;
        Ok(Self { weight, bias, name: scope.name().to_owned(), stride, padding, precision: scope.precision() })
    }

    /// `(batch, height, width, in)` → `(batch, height / stride, width / stride, out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d_in(self.precision, x, &self.weight, Some(&self.bias), self.stride, self.padding)
    }

    fn geometry(&self, input: [usize; 4]) -> Result<Geometry> {
        let (outputs, inputs, height, width) = self.weight.dims4()?;
        Ok(Geometry::new(input, [outputs, inputs, height, width], self.stride, self.padding))
    }

    /// Shape of the output for an input of this shape.
    pub fn output(&self, input: [usize; 4]) -> Result<[usize; 4]> {
        Ok(self.geometry(input)?.output())
    }

    /// Writes the output plus `residual` to `y`.
    pub fn run(&self, x: &Features, residual: Option<&Features>, y: &mut Features) -> Result<()> {
        let (w, b) = (view::<f32>(&self.weight)?, view::<f32>(&self.bias)?);
        let residual = residual.map(|r| r.data.as_slice());
        conv::forward(self.precision, &x.data, &w, Some(&b), residual, &mut y.data, self.geometry(x.shape)?);
        Ok(())
    }

    /// Writes the gradient of the input to `dx`.
    pub fn input_gradient(&self, dy: &Features, dx: &mut Features) -> Result<()> {
        let w = view::<f32>(&self.weight)?;
        conv::input_gradient(self.precision, &dy.data, &w, &mut dx.data, self.geometry(dx.shape)?);
        Ok(())
    }

    /// Adds the gradients of weight and bias.
    pub fn gradients(&self, x: &Features, dy: &Features, gradients: &mut Gradients) -> Result<()> {
        let geometry = self.geometry(x.shape)?;
        self.accumulate(dy, gradients, |dw| conv::weight_gradient(self.precision, &x.data, &dy.data, dw, geometry))
    }

    /// Norm of the weight's gradient, on any device.
    pub fn weight_gradient_norm(&self, x: &Tensor, dy: &Tensor) -> Result<f64> {
        weight_gradient_norm(&self.weight, x, dy, self.stride, self.padding)
    }

    fn accumulate(&self, dy: &Features, gradients: &mut Gradients, add: impl FnOnce(&mut [f32])) -> Result<()> {
        gradients.accumulate(&format!("{}.weight", self.name), self.weight.shape(), |dw, beta| {
            if beta == Beta::Zero {
                dw.fill(0.0);
            }
            add(dw);
        })?;
        gradients.accumulate_vector(&format!("{}.bias", self.name), column_sums(&dy.data, dy.channels()))
    }
}

/// Norm of the weight's gradient, from the input and the gradient of the output.
pub fn weight_gradient_norm(weight: &Tensor, x: &Tensor, dy: &Tensor, stride: usize, padding: Padding) -> Result<f64> {
    let weight = Var::from_tensor(weight)?;
    let y = ops::conv2d(&x.detach(), &weight, None, stride, padding)?;
    let store = (y * dy.detach())?.sum_all()?.backward()?;
    let gradient = store.get(&weight).context("no gradient of the weight")?;
    Ok(f64::from(gradient.sqr()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?).sqrt())
}

/// A 3×3 convolution after nearest-neighbor upsampling by 2.
pub struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub fn new(scope: &Scope, channels: usize) -> Result<Self> {
        Ok(Self { conv: Conv2d::same(&scope.at("conv"), channels, channels, 3)? })
    }

    /// `(batch, height, width, c)` → `(batch, 2 height, 2 width, c)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv.forward(&ops::upsample_nearest2x(x)?)
    }

    /// Writes the output to `y`.
    pub fn run(&self, x: &Features, y: &mut Features) -> Result<()> {
        let (w, b) = (view::<f32>(&self.conv.weight)?, view::<f32>(&self.conv.bias)?);
        conv_upsample::forward(self.conv.precision, &x.data, x.shape, &w, &b, &mut y.data);
        Ok(())
    }

    /// Writes the gradient of the input to `dx`.
    pub fn input_gradient(&self, dy: &Features, dx: &mut Features) -> Result<()> {
        let w = view::<f32>(&self.conv.weight)?;
        conv_upsample::input_gradient(self.conv.precision, &dy.data, &w, dy.channels(), &mut dx.data, dx.shape);
        Ok(())
    }

    /// Adds the gradients of weight and bias.
    pub fn gradients(&self, x: &Features, dy: &Features, gradients: &mut Gradients) -> Result<()> {
        self.conv.accumulate(dy, gradients, |dw| {
            conv_upsample::weight_gradient(self.conv.precision, &x.data, x.shape, &dy.data, dy.channels(), dw);
        })
    }
}
