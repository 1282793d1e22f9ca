//! The products in the middle of [`super`], one at each point of the transforms.

use super::transforms::POINTS;
use crate::ops::conv::{
    geometry::Geometry,
    kernel::{Element, Kernel, Product},
};

/// Channels come in multiples of this.
pub(super) const GROUP: usize = 16;

/// Where the transforms of a strip lie: 16 points of `patches · channels`, a little apart so that they do not
/// fall on the same lines of the cache.
pub(super) fn point_stride(patches: usize, channels: usize) -> usize {
    patches * channels + GROUP
}

/// Multiplies the transforms at the 16 points.
pub trait Multiplier<T>: Copy + Sync {
    /// Transformed filters as it reads them.
    type Filters: Sync;
    /// What one task needs besides the factors.
    type Buffer: Default;

    /// Outputs of one panel of filters.
    fn width(self) -> usize;

    /// From (panel of outputs, point, input, output of the panel).
    fn filters(self, transformed: Vec<T>, inputs: usize) -> Self::Filters;

    /// At each point, (patches, inputs) · (inputs, outputs). Layout of input and products: (point, patch, channel).
    fn multiply(
        self,
        input: &[T],
        filters: &Self::Filters,
        products: &mut Vec<T>,
        patches: usize,
        g: Geometry,
        buffer: &mut Self::Buffer,
    );

    /// At each point, (inputs, patches) · (patches, outputs) onto the sums (point, input, output). The factors lie as
    /// (point, group, patch, channel of the group), in groups of [`GROUP`] inputs and of `width` outputs.
    fn add_products(
        self,
        input: &[T],
        gradient: &[T],
        sums: &mut [T],
        patches: usize,
        g: Geometry,
        buffer: &mut Self::Buffer,
    );
}

/// Exactly, as far as sums of `T` are.
impl<T: Element> Multiplier<T> for Kernel<T> {
    type Filters = Vec<T>;
    type Buffer = ();

    fn width(self) -> usize {
        self.width
    }

    fn filters(self, transformed: Vec<T>, _: usize) -> Vec<T> {
        transformed
    }

    fn multiply(self, input: &[T], filters: &Vec<T>, products: &mut Vec<T>, patches: usize, g: Geometry, (): &mut ()) {
        let (from, to) = (point_stride(patches, g.inputs), point_stride(patches, g.outputs));
        products.resize(POINTS * to, T::ZERO);
        assert!(input.len() >= POINTS * from && filters.len() == POINTS * g.inputs * g.outputs);
        for point in 0..POINTS {
            for column in (0..g.outputs).step_by(self.width) {
                let product = Product {
                    m: patches,
                    outer: 1,
                    inner: g.inputs,
                    a: input[point * from..].as_ptr(),
                    a_m: g.inputs,
                    a_outer: 0,
                    a_inner: 1,
                    b: filters[(column * POINTS + point * self.width) * g.inputs..].as_ptr(),
                    b_outer: 0,
                    b_inner: self.width,
                    c: products[point * to + column..].as_mut_ptr(),
                    c_m: g.outputs,
                    fresh: true,
                };
                // SAFETY: the assertion for A and B, the size given to `products` for C.
                unsafe { (self.run)(product) };
            }
        }
    }

    fn add_products(self, input: &[T], gradient: &[T], sums: &mut [T], patches: usize, g: Geometry, (): &mut ()) {
        let (a, b) = (point_stride(patches, g.inputs), point_stride(patches, g.outputs));
        assert!(input.len() >= POINTS * a && gradient.len() >= POINTS * b);
        assert!(sums.len() == POINTS * g.inputs * g.outputs);
        for point in 0..POINTS {
            for row in (0..g.inputs).step_by(GROUP) {
                for column in (0..g.outputs).step_by(self.width) {
                    let product = Product {
                        m: GROUP,
                        outer: 1,
                        inner: patches,
                        a: input[point * a + row * patches..].as_ptr(),
                        a_m: 1,
                        a_outer: 0,
                        a_inner: GROUP,
                        b: gradient[point * b + column * patches..].as_ptr(),
                        b_outer: 0,
                        b_inner: self.width,
                        c: sums[(point * g.inputs + row) * g.outputs + column..].as_mut_ptr(),
                        c_m: g.outputs,
                        fresh: false,
                    };
                    // SAFETY: the assertions above.
                    unsafe { (self.run)(product) };
                }
            }
        }
    }
}
