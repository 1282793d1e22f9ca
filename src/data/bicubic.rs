//! Bicubic resizing with antialiasing, bit-equal to Pillow's `Image.resize(.., BICUBIC)`, which CLIP's preprocessing uses:
//! first along rows, then along columns, with weights of 22 bits and each pass rounded to 8 bits.

use image::RgbImage;

/// Radius of the kernel in pixels of the smaller image.
const RADIUS: f64 = 2.0;
/// The parameter a of the cubic kernel.
const A: f64 = -0.5;
/// Bits of a weight behind the point.
const BITS: u32 = 22;

/// The source pixels of one target pixel.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Resizes an image to `width` × `height` pixels, on the calling thread: reader threads must not wait for the pool, which
/// may wait for them.
pub fn resize_bicubic(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    if image.dimensions() == (width, height) {
        return image.clone();
    }
    let (from_width, from_height) = (image.width() as usize, image.height() as usize);
    let (to_width, to_height) = (width as usize, height as usize);
    let (columns, rows) = (taps(from_width, to_width), taps(from_height, to_height));
    // Sums of the rows that have an effect on each row of the target: all resized rows of a very high image would not fit
    // into memory.
    let mut sums = vec![0; to_width * to_height * 3];
    let (mut row, mut done) = (vec![0; to_width * 3], 0);
    for (y, from) in image.as_raw().chunks_exact(from_width * 3).enumerate() {
        resize_row(from, &columns, &mut row);
        done += rows.iter().skip(done).take_while(|taps| taps.first + taps.weights.len() <= y).count();
        let open = rows.iter().zip(sums.chunks_exact_mut(to_width * 3)).skip(done);
        for (taps, sums) in open.take_while(|(taps, _)| taps.first <= y) {
            let weight = taps.weights.get(y - taps.first).copied().unwrap_or_default();
            sums.iter_mut().zip(&row).for_each(|(sum, value)| *sum += i32::from(*value) * weight);
        }
    }
    RgbImage::from_raw(width, height, sums.into_iter().map(rounded).collect()).unwrap_or_default()
}

fn resize_row(from: &[u8], columns: &[Taps], to: &mut [u8]) {
    for (pixel, taps) in to.chunks_exact_mut(3).zip(columns) {
        for (color, value) in pixel.iter_mut().enumerate() {
            let terms = taps.weights.iter().enumerate();
            *value = rounded(terms.map(|(i, weight)| i32::from(from[(taps.first + i) * 3 + color]) * weight).sum());
        }
    }
}

/// A weighted sum as a color.
fn rounded(sum: i32) -> u8 {
    ((sum + (1 << (BITS - 1))) >> BITS).clamp(0, 255) as u8
}

/// The taps of each of `to` pixels over `from` pixels.
fn taps(from: usize, to: usize) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    // Reduced images are smoothed by a kernel that covers as much of the source as of the target.
    let stretch = scale.max(1.0);
    let shrink = 1.0 / stretch;
    let of_pixel = |pixel: usize| {
        let center = (pixel as f64 + 0.5) * scale;
        let first = (center - RADIUS * stretch + 0.5).max(0.0) as usize;
        let end = ((center + RADIUS * stretch + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..end).map(|i| cubic((i as f64 - center + 0.5) * shrink)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: f64| (weight / sum * f64::from(1 << BITS)).round() as i32;
        Taps { first, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).map(of_pixel).collect()
}

/// Keys' cubic convolution kernel.
fn cubic(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < RADIUS {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::{Context, Result},
        nn::weights,
    };
    use candle_core::Tensor;

    /// Against Pillow (scripts/golden_bicubic.py).
    #[test]
    fn every_pixel_is_pillow_s() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../tests/golden/bicubic.safetensors"), "golden")?;
        let image = |tensor: &Tensor| -> Result<RgbImage> {
            let (height, width, _) = tensor.dims3()?;
            let bytes = tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|value| value as u8).collect();
            RgbImage::from_raw(width as u32, height as u32, bytes).context("the size of an image")
        };
        assert_eq!(golden.len(), 26);
        for index in 0..golden.len() / 2 {
            let [from, to] = [image(&golden[&format!("{index:02}.from")])?, image(&golden[&format!("{index:02}.to")])?];
            assert!(
                resize_bicubic(&from, to.width(), to.height()) == to,
                "{:?} to {:?}",
                from.dimensions(),
                to.dimensions()
            );
        }
        Ok(())
    }
}
