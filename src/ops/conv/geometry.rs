//! Sizes of a convolution, its padding, and the tiles of rows into which its images are split.

use super::kernel::Element;
use std::ops::Range;

/// Zero pixels around an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Padding {
    pub top: usize,
    pub bottom: usize,
    pub left: usize,
    pub right: usize,
}

impl Padding {
    /// The same on every side.
    pub const fn same(pixels: usize) -> Self {
        Self { top: pixels, bottom: pixels, left: pixels, right: pixels }
    }
}

/// The sizes of one convolution.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    pub(super) images: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) inputs: usize,
    pub(super) out_height: usize,
    pub(super) out_width: usize,
    pub(super) outputs: usize,
    pub(super) kernel_height: usize,
    pub(super) kernel_width: usize,
    pub(super) stride: usize,
    /// Rows of padding above and columns of padding left of the image; negative where the image is cropped.
    pub(super) top: isize,
    pub(super) left: isize,
}

/// Target size of a tile in elements of the padded buffer: 256 K, so that it fits in L2 together with weights and
/// output.
const TILE: usize = 1 << 16;

/// Some rows of the output of one image.
#[derive(Clone)]
pub(super) struct Tile {
    pub(super) image: usize,
    pub(super) rows: Range<usize>,
}

impl Geometry {
    /// `x (b, h, w, in)`, `w (out, in, kh, kw)`; the padded image is at least as large as the kernel.
    ///
    /// The channels of `x` and `w` differ (a bug in the caller).
    /// The channels of `x` and `w` differ (a defect of the caller).
    pub fn new(
        [images, height, width, inputs]: [usize; 4],
        [outputs, w_inputs, kernel_height, kernel_width]: [usize; 4],
        stride: usize,
        padding: Padding,
    ) -> Self {
        assert_eq!(inputs, w_inputs, "input channels of a convolution");
        Self {
            images,
            height,
            width,
            inputs,
            out_height: (height + padding.top + padding.bottom - kernel_height) / stride + 1,
            out_width: (width + padding.left + padding.right - kernel_width) / stride + 1,
            outputs,
            kernel_height,
            kernel_width,
            stride,
            top: padding.top as isize,
            left: padding.left as isize,
        }
    }

    /// Shape of the output.
    pub fn output(&self) -> [usize; 4] {
        [self.images, self.out_height, self.out_width, self.outputs]
    }

    /// Shape of the input.
    pub fn input(&self) -> [usize; 4] {
        [self.images, self.height, self.width, self.inputs]
    }

    /// The convolution (of the output's gradient, with flipped weights) that gives the input's gradient if the stride
    /// is 1.
    pub(super) fn transposed(self) -> Self {
        Self {
            height: self.out_height,
            width: self.out_width,
            inputs: self.outputs,
            out_height: self.height,
            out_width: self.width,
            outputs: self.inputs,
            top: self.kernel_height as isize - 1 - self.top,
            left: self.kernel_width as isize - 1 - self.left,
            ..self
        }
    }

    /// Number of elements of a row of the padded buffer.
    pub(super) fn padded_row(&self) -> usize {
        ((self.out_width - 1) * self.stride + self.kernel_width) * self.inputs
    }

    pub(super) fn out_row(&self) -> usize {
        self.out_width * self.outputs
    }

    /// Weights of one output channel in one kernel row; they are adjacent in the padded buffer.
    pub(super) fn taps(&self) -> usize {
        self.kernel_width * self.inputs
    }

    pub(super) fn tile_rows(&self) -> usize {
        (TILE / (self.padded_row() * self.stride).max(1)).clamp(1, self.out_height)
    }

    pub(super) fn tile(&self, image: usize, index: usize) -> Tile {
        let first = index * self.tile_rows();
        Tile { image, rows: first..(first + self.tile_rows()).min(self.out_height) }
    }

    pub(super) fn tiles(&self) -> Vec<Tile> {
        let per_image = self.out_height.div_ceil(self.tile_rows());
        (0..self.images * per_image).map(|i| self.tile(i / per_image, i % per_image)).collect()
    }

    /// The part of the padded image that a tile reads; a view of the image itself if there is no padding.
    pub(super) fn padded<'a, T: Element>(&self, x: &'a [T], tile: &Tile, buffer: &'a mut Vec<T>) -> &'a [T] {
        let image = &x[tile.image * self.height * self.width * self.inputs..][..self.height * self.width * self.inputs];
        if self.kernel_height * self.kernel_width * self.stride == 1 && (self.top, self.left) == (0, 0) {
            return &image[tile.rows.start * self.padded_row()..tile.rows.end * self.padded_row()];
        }
        let rows = (tile.rows.len() - 1) * self.stride + self.kernel_height;
        buffer.resize(rows * self.padded_row(), T::ZERO);
        for (i, out) in buffer.chunks_exact_mut(self.padded_row()).enumerate() {
            let row = (tile.rows.start * self.stride + i) as isize - self.top;
            match usize::try_from(row) {
                Ok(row) if row < self.height => {
                    self.pad_row(&image[row * self.width * self.inputs..][..self.width * self.inputs], out);
                }
                _ => out.fill(T::ZERO),
            }
        }
        buffer
    }

    fn pad_row<T: Element>(&self, row: &[T], out: &mut [T]) {
        let inputs = self.inputs;
        let (before, cut) = (self.left.max(0) as usize * inputs, (-self.left).max(0) as usize * inputs);
        let row = &row[cut.min(row.len())..];
        let before = before.min(out.len());
        let copied = row.len().min(out.len() - before);
        out[..before].fill(T::ZERO);
        out[before..before + copied].copy_from_slice(&row[..copied]);
        out[before + copied..].fill(T::ZERO);
    }
}
