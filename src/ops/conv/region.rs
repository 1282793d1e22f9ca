//! Rectangles of a zero-padded image, which are copied only if they extend beyond its border.

use super::kernel::Element;

/// Pixels of an image that patches read, with the strides of rows and pixels.
pub(super) struct Region<'a, T> {
    pub(super) pixels: &'a [T],
    pub(super) row: usize,
    pub(super) pixel: usize,
}

impl<T> Region<'_, T> {
    /// The same pixels without their first `channels` channels.
    pub(super) fn without_channels(self, first: usize) -> Self {
        Self { pixels: &self.pixels[first..], ..self }
    }
}

/// An image `(height, width, channels)`.
#[derive(Clone, Copy)]
pub(super) struct Image<'a, T> {
    pixels: &'a [T],
    height: usize,
    width: usize,
    channels: usize,
}

impl<'a, T: Element> Image<'a, T> {
    /// Image number `image` of a batch.
    pub(super) fn new(x: &'a [T], image: usize, height: usize, width: usize, channels: usize) -> Self {
        let size = height * width * channels;
        Self { pixels: &x[image * size..(image + 1) * size], height, width, channels }
    }

    /// The rectangle at (`top`, `left`), with zeros outside of the image. Copies only if a part is outside.
    pub(super) fn region(
        &self,
        (top, left): (isize, isize),
        (rows, columns): (usize, usize),
        buffer: &'a mut Vec<T>,
    ) -> Region<'a, T> {
        let (height, width, channels) = (self.height as isize, self.width as isize, self.channels);
        if top >= 0 && left >= 0 && top + rows as isize <= height && left + columns as isize <= width {
            let start = (top as usize * self.width + left as usize) * channels;
            return Region { pixels: &self.pixels[start..], row: self.width * channels, pixel: channels };
        }
        let row = columns * channels;
        buffer.resize(rows * row, T::ZERO);
        let first = left.clamp(0, width);
        let last = (left + columns as isize).clamp(first, width);
        let (before, copied) = ((first - left) as usize * channels, (last - first) as usize * channels);
        for (i, out) in buffer.chunks_exact_mut(row).enumerate() {
            let y = top + i as isize;
            if (0..height).contains(&y) && copied > 0 {
                let from = (y as usize * self.width + first as usize) * channels;
                out[..before].fill(T::ZERO);
                out[before..before + copied].copy_from_slice(&self.pixels[from..from + copied]);
                out[before + copied..].fill(T::ZERO);
            } else {
                out.fill(T::ZERO);
            }
        }
        Region { pixels: buffer, row, pixel: channels }
    }
}
