//! The location of a tensor in a file: shape, strides and the bytes of its storage.

use crate::error::{Result, ensure};
use safetensors::Dtype;
use std::ops::Range;

/// Maximum number of dimensions of a tensor.
pub(super) const MAX_DIMENSIONS: usize = 16;

/// A tensor in a file: element (i, j, ..) is number `offset + i · strides[0] + j · strides[1] + ..` of `bytes`.
pub(super) struct Stored {
    pub(super) file: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
    pub(super) offset: usize,
    pub(super) bytes: Range<usize>,
}

impl Stored {
    /// The range of elements of `bytes` that the tensor covers.
    pub(super) fn extent(&self) -> (usize, usize) {
        if self.shape.contains(&0) {
            return (0, 0);
        }
        let last: usize = self.shape.iter().zip(&self.strides).map(|(size, stride)| (size - 1) * stride).sum();
        (self.offset, self.offset + last + 1)
    }

    /// Checks that the tensor is inside its bytes. Elements that a view repeats are subtracted from the budget
    /// `repeated`.
    pub(super) fn check(self, repeated: &mut usize) -> Result<Self> {
        let held = self.bytes.len() / (self.dtype.bitsize() / 8).max(1);
        let mut steps =
            self.shape.iter().zip(&self.strides).map(|(size, stride)| size.saturating_sub(1).checked_mul(*stride));
        let end = steps.try_fold(self.offset, |sum, step| sum.checked_add(step?));
        let count = self.shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
        let left = count.and_then(|count| repeated.checked_sub(count.saturating_sub(held)));
        let fits = self.shape.len() == self.strides.len() && self.shape.len() <= MAX_DIMENSIONS && left.is_some();
        let inside = self.shape.contains(&0) || end.is_some_and(|end| end < held);
        ensure!(fits && inside, "a tensor of shape {:?} in {held} elements", self.shape);
        *repeated = left.unwrap_or(0);
        Ok(self)
    }

    /// The elements in row-major order, from the bytes of [`Stored::extent`].
    pub(super) fn contiguous(&self, values: &[f32]) -> Vec<f32> {
        let count = self.shape.iter().product();
        let (mut index, mut place) = (vec![0; self.shape.len()], 0);
        let mut ordered = Vec::with_capacity(count);
        for _ in 0..count {
            ordered.push(values[place]);
            // The last dimension varies fastest.
            for (dimension, at) in index.iter_mut().enumerate().rev() {
                *at += 1;
                place += self.strides[dimension];
                if *at < self.shape[dimension] {
                    break;
                }
                place -= *at * self.strides[dimension];
                *at = 0;
            }
        }
        ordered
    }
}

/// Row-major strides of a tensor of this shape.
pub(super) fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides: Vec<usize> = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}
