//! Pixel similarity of two images of one size: PSNR and SSIM.

use image::RgbImage;

/// Side length of SSIM's window in pixels.
const WINDOW: u32 = 7;

/// Peak signal-to-noise ratio in dB of two images of one size. Equal images are treated as if one value differed by 1,
/// so that the result is finite.
pub fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let squares = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2));
    let error = squares.sum::<f64>().max(1.0) / a.as_raw().len() as f64;
    10.0 * (255.0 * 255.0 / error).log10()
}

/// Structural similarity (Wang et al. 2004, doi 10.1109/TIP.2003.819861) of two images of one size, as in scikit-image:
/// the mean over uniform 7 × 7 windows inside the image and over colors. `None` if the image is smaller than a window.
pub fn ssim(a: &RgbImage, b: &RgbImage) -> Option<f64> {
    let (width, height) = a.dimensions();
    if width < WINDOW || height < WINDOW {
        return None;
    }
    let (mut sum, mut count) = (0.0, 0);
    for y in 0..=height - WINDOW {
        for x in 0..=width - WINDOW {
            for channel in 0..3 {
                sum += window(a, b, [x, y], channel);
                count += 1;
            }
        }
    }
    Some(sum / f64::from(count))
}

fn window(a: &RgbImage, b: &RgbImage, [left, top]: [u32; 2], channel: usize) -> f64 {
    // The stabilising constants for values up to 255.
    let (c1, c2) = ((0.01f64 * 255.0).powi(2), (0.03f64 * 255.0).powi(2));
    let [mut a_sum, mut b_sum, mut aa, mut bb, mut ab] = [0.0; 5];
    for y in top..top + WINDOW {
        for x in left..left + WINDOW {
            let (a, b) = (f64::from(a.get_pixel(x, y).0[channel]), f64::from(b.get_pixel(x, y).0[channel]));
            a_sum += a;
            b_sum += b;
            aa += a * a;
            bb += b * b;
            ab += a * b;
        }
    }
    let n = f64::from(WINDOW * WINDOW);
    let (a_mean, b_mean) = (a_sum / n, b_sum / n);
    let (a_var, b_var) = ((aa - a_sum * a_mean) / (n - 1.0), (bb - b_sum * b_mean) / (n - 1.0));
    let cov = (ab - a_sum * b_mean) / (n - 1.0);
    (2.0 * a_mean * b_mean + c1) * (2.0 * cov + c2) / ((a_mean * a_mean + b_mean * b_mean + c1) * (a_var + b_var + c2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Result, nn::weights, ops::testing::values};
    use image::Rgb;

    /// Against scikit-image (scripts/golden_frechet.py).
    #[test]
    fn ssim_equals_scikit_image() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../tests/golden/similarity.safetensors"), "golden")?;
        let image = |name: &str| {
            let bytes = values(&golden[name]).into_iter().map(|value| value as u8).collect();
            RgbImage::from_raw(24, 20, bytes).unwrap()
        };
        for (name, theirs) in ["near", "far"].into_iter().zip(values(&golden["ssim"])) {
            let ours = ssim(&image("first"), &image(name)).unwrap();
            assert!((ours - theirs).abs() < 1e-6, "{name}: {ours} instead of {theirs}");
        }
        assert_eq!(ssim(&image("first"), &image("first")), Some(1.0));
        Ok(())
    }

    #[test]
    fn psnr_of_a_constant_difference() {
        let grey = |value| RgbImage::from_pixel(4, 4, Rgb([value; 3]));
        assert!((psnr(&grey(100), &grey(110)) - 20.0 * 25.5f64.log10()).abs() < 1e-9);
        assert!(psnr(&grey(7), &grey(7)) > 60.0 && psnr(&grey(7), &grey(7)).is_finite());
        assert_eq!(ssim(&grey(7), &grey(9)), None, "no window fits");
    }
}
