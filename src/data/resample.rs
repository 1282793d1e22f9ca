//! Resizing with antialiasing as in Pillow's `Image.resize`, which CLIP's preprocessing and the protocols of the FID use:
//! first along rows, then along columns. Images of 8 bits are bit-equal to Pillow's: weights have 22 bits, and each pass is
//! rounded to 8 bits. Images of mode `F` are computed in f64 and stored as f32 after each pass.

use image::RgbImage;

/// Bits of a weight behind the point.
const BITS: u32 = 22;
/// The parameter a of the cubic kernel.
const A: f64 = -0.5;

/// The kernel of a resizing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// A triangle.
    Bilinear,
    /// Keys' cubic convolution with a = -0.5.
    Bicubic,
}

impl Filter {
    /// Radius of the kernel in pixels of the smaller image.
    fn radius(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Self::Bicubic => 0.0,
        }
    }
}

/// The source pixels of one target pixel.
struct Taps {
    first: usize,
    weights: Vec<f64>,
}

/// Resizes an image to `width` × `height` pixels with the bicubic kernel.
pub fn resize_bicubic(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    resize(image, Filter::Bicubic, width, height)
}

/// Resizes an image to `width` × `height` pixels, on the calling thread: reader threads must not wait for the pool, which
/// may wait for them.
pub fn resize(image: &RgbImage, filter: Filter, width: u32, height: u32) -> RgbImage {
    if image.dimensions() == (width, height) {
        return image.clone();
    }
    let kernel = Kernel {
        weight: |weight: f64| (weight * f64::from(1 << BITS)).round() as i32,
        add: |sum: i32, value: u8, weight: i32| sum + i32::from(value) * weight,
        finish: |sum: i32| ((sum + (1 << (BITS - 1))) >> BITS).clamp(0, 255) as u8,
    };
    let pixels = two_passes(image.as_raw(), image.dimensions(), (width, height), filter, &kernel);
    RgbImage::from_raw(width, height, pixels).unwrap_or_default()
}

/// The same for values that are not rounded, `(height, width, 3)` from 0 to 255 or slightly outside.
pub fn resize_unrounded(image: &RgbImage, filter: Filter, width: u32, height: u32) -> Vec<f32> {
    let values: Vec<f32> = image.as_raw().iter().map(|value| f32::from(*value)).collect();
    let kernel = Kernel {
        weight: |weight: f64| weight,
        add: |sum: f64, value: f32, weight: f64| sum + f64::from(value) * weight,
        finish: |sum: f64| sum as f32,
    };
    two_passes(&values, image.dimensions(), (width, height), filter, &kernel)
}

/// How values are weighted.
struct Kernel<W, A, F> {
    /// A weight in the type of the sums.
    weight: W,
    /// Sum, value and weight to the next sum.
    add: A,
    /// A sum as a value.
    finish: F,
}

/// Resizes along rows, then along columns. Of the rows between the passes only sums are in memory: all rows of a very high
/// image would not fit.
fn two_passes<T: Copy + Default, S: Copy + Default>(
    values: &[T],
    from: (u32, u32),
    to: (u32, u32),
    filter: Filter,
    kernel: &Kernel<impl Fn(f64) -> S, impl Fn(S, T, S) -> S, impl Fn(S) -> T>,
) -> Vec<T> {
    let (from_width, from_height) = (from.0 as usize, from.1 as usize);
    let (to_width, to_height) = (to.0 as usize, to.1 as usize);
    let prepare = |taps: Taps| (taps.first, taps.weights.into_iter().map(&kernel.weight).collect::<Vec<S>>());
    let columns: Vec<_> = taps(filter, from_width, to_width).into_iter().map(prepare).collect();
    let rows: Vec<_> = taps(filter, from_height, to_height).into_iter().map(prepare).collect();
    let mut sums = vec![S::default(); to_width * to_height * 3];
    let (mut row, mut done) = (vec![T::default(); to_width * 3], 0);
    for (y, from) in values.chunks_exact(from_width * 3).enumerate() {
        for (pixel, (first, weights)) in row.chunks_exact_mut(3).zip(&columns) {
            let from = from[first * 3..].chunks_exact(3);
            for (color, value) in pixel.iter_mut().enumerate() {
                let terms = from.clone().zip(weights);
                let sum = terms.fold(S::default(), |sum, (from, weight)| (kernel.add)(sum, from[color], *weight));
                *value = (kernel.finish)(sum);
            }
        }
        done += rows.iter().skip(done).take_while(|(first, weights)| first + weights.len() <= y).count();
        let open = rows.iter().zip(sums.chunks_exact_mut(to_width * 3)).skip(done);
        for ((first, weights), sums) in open.take_while(|((first, _), _)| *first <= y) {
            let Some(weight) = weights.get(y - first) else { continue };
            sums.iter_mut().zip(&row).for_each(|(sum, value)| *sum = (kernel.add)(*sum, *value, *weight));
        }
    }
    sums.into_iter().map(&kernel.finish).collect()
}

/// The taps of each of `to` pixels over `from` pixels.
fn taps(filter: Filter, from: usize, to: usize) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    // Reduced images are smoothed by a kernel that covers as much of the source as of the target.
    let stretch = scale.max(1.0);
    let (shrink, radius) = (1.0 / stretch, filter.radius());
    let of_pixel = |pixel: usize| {
        let center = (pixel as f64 + 0.5) * scale;
        let first = (center - radius * stretch + 0.5).max(0.0) as usize;
        let end = ((center + radius * stretch + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..end).map(|i| filter.weight((i as f64 - center + 0.5) * shrink)).collect();
        let sum: f64 = weights.iter().sum();
        Taps { first, weights: weights.into_iter().map(|weight| weight / sum).collect() }
    };
    (0..to).map(of_pixel).collect()
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

    /// Against Pillow's bilinear kernel and clean-fid's unrounded bicubic one (scripts/golden_fid.py).
    #[test]
    fn the_protocols_of_the_fid_resize_as_pillow() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../tests/golden/fid.safetensors"), "golden")?;
        let bytes = |tensor: &Tensor| -> Result<Vec<u8>> {
            Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|value| value as u8).collect())
        };
        for number in 0..3 {
            let [from, bilinear, clean] =
                ["from", "bilinear", "clean"].map(|name| &golden[&format!("resize.{number}.{name}")]);
            let (height, width, _) = from.dims3()?;
            let image =
                RgbImage::from_raw(width as u32, height as u32, bytes(from)?).context("the size of an image")?;
            let (height, width, _) = bilinear.dims3()?;
            let (width, height) = (width as u32, height as u32);
            assert!(resize(&image, Filter::Bilinear, width, height).as_raw() == &bytes(bilinear)?, "{number}");
            let ours = resize_unrounded(&image, Filter::Bicubic, width, height);
            for (ours, theirs) in ours.into_iter().zip(clean.flatten_all()?.to_vec1::<f32>()?) {
                assert!((ours.clamp(0.0, 255.0) - theirs).abs() < 1e-4, "{number}: {ours} instead of {theirs}");
            }
        }
        Ok(())
    }
}
