//! The MLP of a transformer block with hand-written forward and backward passes over slices, for the CPU.

use super::{block::BlockLayers, gradients::Gradients, linear::Linear};
use crate::{
    config::{Activation, Precision},
    error::Result,
    ops::activation,
};

/// `y = fc2(activation(fc1(x)))`, with linear layers in `precision`.
pub struct ManualMlp<'a> {
    fc1: &'a Linear,
    fc2: &'a Linear,
    activation: Activation,
    precision: Precision,
}

impl<'a> ManualMlp<'a> {
    /// The MLP of these layers.
    pub fn new([fc1, fc2]: [&'a Linear; 2], activation: Activation, precision: Precision) -> Self {
        Self { fc1, fc2, activation, precision }
    }

    /// The MLP of a block.
    pub fn of<N>(layers: &'a BlockLayers<N, Linear>, activation: Activation, precision: Precision) -> Self {
        Self::new([&layers.fc1, &layers.fc2], activation, precision)
    }

    /// x (l, hidden) → y + `residual` (l, hidden), and the hidden layer before the activation (l, inner), which the
    /// backward pass needs. A vector as `x` is freed before `fc2`.
    ///
    /// # Errors
    /// A parameter is not f32 in memory of the CPU.
    pub fn forward(&self, x: impl AsRef<[f32]>, residual: Option<&[f32]>) -> Result<(Vec<f32>, Vec<f32>)> {
        let (inner, activated) = self.fc1.manual_activated(self.precision, self.activation, x.as_ref())?;
        drop(x);
        Ok((self.fc2.manual(self.precision, &activated, residual)?, inner))
    }

    /// Adds the parameters' gradients and returns dx (l, hidden). `x` is called as late as possible: most blocks compute
    /// it again.
    ///
    /// # Errors
    /// As [`ManualMlp::forward`], or that of `x`.
    pub fn backward(
        &self,
        x: impl FnOnce() -> Result<Vec<f32>>,
        inner: Vec<f32>,
        dy: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let activated = activation::forward(self.activation, &inner);
        let dactivated = self.fc2.manual_backward(self.precision, &activated, dy, gradients)?;
        drop(activated);
        let dinner = activation::backward(self.activation, &inner, &dactivated);
        drop((inner, dactivated));
        self.fc1.manual_backward(self.precision, &x()?, &dinner, gradients)
    }
}
