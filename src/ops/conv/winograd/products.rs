//! The matrix products of [`super`], one at each of the 16 points of the transforms.

use super::transforms::POINTS;
use crate::ops::conv::{
    geometry::Geometry,
    kernel::{Element, Kernel, Product},
};

/// The number of channels is a multiple of this.
pub(super) const GROUP: usize = 16;

/// Layout of the transforms of a strip: 16 points of `patches · channels`, with gaps between them so that they do not
/// map to the same cache lines.
pub(super) fn point_stride(patches: usize, channels: usize) -> usize {
    patches * channels + GROUP
}

/// Multiplies the transforms at the 16 points.
pub trait Multiplier<T>: Copy + Sync {
    /// Transformed filters in the layout of the multiplier.
    type Filters: Sync;
    /// Buffers of one task besides the factors.
    type Buffer: Default;

    /// Number of outputs per panel of filters.
    fn width(self) -> usize;

    /// Converts filters from (panel of outputs, point, input, output of the panel).
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

    /// At each point, (inputs, patches) · (patches, outputs) added to the sums (point, input, output). The layout of
    /// the factors is (point, group, patch, channel of the group), with groups of [`GROUP`] inputs and of `width`
    /// outputs.
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

/// Exact, as far as sums of `T` are.
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
