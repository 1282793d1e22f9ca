//! GroupNorm (arXiv 1803.08494) over `(batch, height, width, channels)`, as in VQGAN.

use super::{
    features::Features,
    gradients::Gradients,
    params::{Init, Scope},
};
use crate::{
    error::{Result, ensure},
    ops::{
        self,
        group_norm::{GroupNorm as Kernel, Statistics},
        slices::view,
    },
};
use candle_core::Tensor;

/// taming-transformers uses 32 groups, so the number of channels must be a multiple of 32.
pub const GROUPS: usize = 32;
const EPS: f64 = 1e-6;

/// GroupNorm with 32 groups and a scale and shift per channel.
///
/// The methods on [`Features`] are the manual pass.
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    name: String,
}

impl GroupNorm {
    /// A norm over `channels` channels.
    ///
    /// # Errors
    /// The number of channels is not a multiple of [`GROUPS`].
    pub fn new(scope: &Scope, channels: usize) -> Result<Self> {
        ensure!(
            channels.is_multiple_of(GROUPS),
            "{channels} channels are not a multiple of the norm's {GROUPS} groups"
        );
        Ok(Self {
            weight: scope.get("weight", channels, Init::Ones)?,
            bias: scope.get("bias", channels, Init::Zeros)?,
            name: scope.name().to_owned(),
        })
    }

    /// Normalizes the input; same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, GROUPS, EPS, false)
    }

    /// `swish(norm(x))` in one pass.
    pub fn silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, GROUPS, EPS, true)
    }

    /// Statistics of an input that [`GroupNorm::run`] and [`GroupNorm::backward`] use.
    pub fn statistics(&self, x: &Features) -> Statistics<f32> {
        kernel(false).statistics(&x.data, x.channels(), x.image())
    }

    /// Writes the normalized input to `y`, followed by SiLU if `silu`.
    pub fn run(&self, x: &Features, statistics: &Statistics<f32>, silu: bool, y: &mut Features) -> Result<()> {
        let (w, b) = (view::<f32>(&self.weight)?, view::<f32>(&self.bias)?);
        kernel(silu).forward(&x.data, &w, &b, statistics, &mut y.data);
        Ok(())
    }

    /// Replaces the gradient of the output in `d` by that of the input plus `plus`; adds the gradients of weight and
    /// bias to
    /// `gradients`.
    pub fn backward(
        &self,
        x: &Features,
        statistics: &Statistics<f32>,
        silu: bool,
        d: &mut Features,
        plus: Option<&Features>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (w, b) = (view::<f32>(&self.weight)?, view::<f32>(&self.bias)?);
        let plus = plus.map(|plus| plus.data.as_slice());
        let [dw, db] = kernel(silu).backward(&x.data, &w, &b, statistics, &mut d.data, plus);
        gradients.accumulate_vector(&format!("{}.weight", self.name), dw)?;
        gradients.accumulate_vector(&format!("{}.bias", self.name), db)
    }
}

fn kernel(silu: bool) -> Kernel {
    Kernel { groups: GROUPS, eps: EPS, silu }
}
