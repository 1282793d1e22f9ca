//! Bias, residual and GELU, applied to a tile of a matrix product while it is in cache.

use crate::ops::{
    pointwise::gelu::gate,
    simd::{Real, multiversion},
};
use std::marker::PhantomData;

/// C = A·B + bias + residual, and gelu(C) in a second matrix.
pub struct Epilogue<'a, T> {
    /// One number for each column of C.
    pub bias: Option<&'a [T]>,
    /// A matrix of C's shape.
    pub residual: Option<&'a [T]>,
    /// A matrix of C's shape that receives gelu(C). C itself is kept too, because the gradient needs both.
    pub gelu: Option<&'a mut [T]>,
}

impl<T> Epilogue<'_, T> {
    /// No epilogue.
    pub const NONE: Self = Self { bias: None, residual: None, gelu: None };

    /// Checks the lengths.
    ///
    /// # Panics
    /// A part does not match C (a bug in the caller).
    pub(super) fn check(&self, len: usize, columns: usize) {
        let fits = |part: Option<usize>, expected: usize| part.is_none_or(|part| part == expected);
        assert!(fits(self.bias.map(<[T]>::len), columns), "one bias a column");
        assert!(fits(self.residual.map(<[T]>::len), len), "a residual of the product's shape");
        assert!(fits(self.gelu.as_ref().map(|g| g.len()), len), "gelu of the product's shape");
    }
}

/// A block of a row-major matrix with exclusive access.
pub(super) struct Part<'a, T> {
    start: *mut T,
    pub rows: usize,
    pub columns: usize,
    stride: usize,
    matrix: PhantomData<&'a mut T>,
}

impl<T> Part<'_, T> {
    /// # Safety
    /// `rows` runs of `columns` elements, `stride` apart starting at `start`, are valid, and nobody else accesses them.
    pub unsafe fn new(start: *mut T, rows: usize, columns: usize, stride: usize) -> Self {
        Self { start, rows, columns, stride, matrix: PhantomData }
    }

    pub fn start(&mut self) -> *mut T {
        self.start
    }

    pub fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows, "row out of bounds");
        // SAFETY: in bounds by the assertion; exclusive by the constructors' contracts.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.stride), self.columns) }
    }
}

/// Rows to read, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub start: &'a [T],
    pub stride: usize,
}

multiversion! {
    /// Finishes a part of C: `bias` starts at the part's first column, `residual` and `gelu` at its corner.
    pub(super) fn finish_part<T: Real, const FMA: bool>(
        c: &mut Part<T>,
        bias: Option<&[T]>,
        residual: Option<Rows<T>>,
        gelu: Option<Part<T>>,
    ) {
        let mut gelu = gelu;
        for i in 0..c.rows {
            let row = c.row(i);
            if let Some(bias) = bias {
                row.iter_mut().zip(bias).for_each(|(c, &b)| *c += b);
            }
            if let Some(residual) = residual {
                row.iter_mut().zip(&residual.start[i * residual.stride..]).for_each(|(c, &r)| *c += r);
            }
            if let Some(gelu) = &mut gelu {
                gelu.row(i).iter_mut().zip(&*row).for_each(|(y, &c)| *y = c * gate(c));
            }
        }
    }
}
