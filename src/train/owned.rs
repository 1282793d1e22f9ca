//! What this rank owns of a parameter, where the optimizer updates it.

use crate::{
    error::Result,
    ops::{self, Floats},
};
use candle_core::{Tensor, Var};
use std::ops::Range;

/// This rank's part of a parameter.
pub struct Owned<'a> {
    pub name: &'a str,
    pub var: &'a Var,
    /// Summed over the ranks.
    pub gradient: &'a Tensor,
    pub(super) range: Range<usize>,
    /// `None`: they lie in the variable.
    pub(super) weights: Option<&'a mut Floats>,
}

impl Owned<'_> {
    /// How many this rank owns.
    pub fn elements(&self) -> usize {
        self.range.len()
    }

    /// Calls `f` with these weights, to change them, and their gradient.
    pub fn update(self, f: impl FnOnce(&mut [f32], &[f32]) -> Result<()>) -> Result<()> {
        let Self { var, gradient, range, weights, .. } = self;
        ops::with_slice(gradient, |gradient: &[f32]| match weights {
            Some(weights) => f(weights, gradient),
            None => ops::with_slice_mut(var, |weights| f(&mut weights[range], gradient))?,
        })?
    }
}
