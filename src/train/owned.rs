//! What this rank owns of a parameter, where the optimizer updates it.

use crate::{
    error::{Result, bail},
    nn::params::Param,
    ops::{self, Buffer},
};
use candle_core::Tensor;
use half::bf16;
use std::ops::Range;

/// This rank's part of a parameter.
pub struct Owned<'a> {
    pub name: &'a str,
    pub param: &'a Param,
    /// Summed over the ranks.
    pub gradient: &'a Tensor,
    pub(super) range: Range<usize>,
    /// `None`: they are in the variable.
    pub(super) weights: Option<&'a mut Buffer>,
    /// The same weights in bf16, if they are sent in bf16.
    pub(super) rounded: Option<&'a mut Vec<bf16>>,
}

impl Owned<'_> {
    /// How many this rank owns.
    pub fn elements(&self) -> usize {
        self.range.len()
    }

    /// Whether the optimizer updates them on the device.
    pub fn is_on_device(&self) -> bool {
        matches!(self.weights, Some(Buffer::Device(_)))
    }

    /// Calls `f` with these weights on the device, flat, to replace them, and their gradient.
    pub fn update_on_device(self, f: impl FnOnce(&mut Tensor, &Tensor) -> Result<()>) -> Result<()> {
        match self.weights {
            Some(weights) => f(weights.on_device()?, &self.gradient.flatten_all()?),
            None => bail!("the weights of `{}` are in its variable", self.name),
        }
    }

    /// Calls `f` with these weights, to change them and their copy in bf16, and their gradient.
    pub fn update(self, f: impl FnOnce(&mut [f32], Option<&mut [bf16]>, &[f32]) -> Result<()>) -> Result<()> {
        let Self { param, gradient, range, weights, rounded, .. } = self;
        let rounded = rounded.map(Vec::as_mut_slice);
        ops::with_slice(gradient, |gradient: &[f32]| match weights {
            Some(weights) => f(weights.on_host()?, rounded, gradient),
            None => ops::with_slice_mut(param, |weights| f(&mut weights[range], rounded, gradient))?,
        })?
    }
}
