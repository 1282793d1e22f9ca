//! How well an image tokenizer keeps colors: the CIE76 difference of saturated pixels, by hue. PSNR, SSIM and LPIPS hardly
//! see a color that becomes gray.

use image::RgbImage;
use serde::Serialize;

/// The least saturation and value (HSV) of a pixel that counts: below, hue is mostly noise.
const LEAST: [f64; 2] = [0.4, 0.2];

/// Sectors of 60°, each around its hue.
const SECTORS: [&str; 6] = ["red", "yellow", "green", "cyan", "blue", "magenta"];

/// The mean difference of the pixels whose original is saturated and in one sector of hue.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sector {
    pub hue: &'static str,
    /// Number of pixels.
    pub pixels: u64,
    /// Mean CIE76 difference (ΔE*ab); about 2.3 is just visible. `None` without pixels.
    pub delta_e: Option<f64>,
}

/// Sums of differences and numbers of pixels, by sector.
#[derive(Debug, Clone, Default)]
pub struct ColorErrors([(f64, u64); SECTORS.len()]);

impl ColorErrors {
    /// Compares an image with its reconstruction, pixel by pixel.
    pub fn of(original: &RgbImage, reconstruction: &RgbImage) -> Self {
        let mut errors = Self::default();
        for (a, b) in original.pixels().zip(reconstruction.pixels()) {
            if let Some((sum, count)) = sector(a.0).and_then(|sector| errors.0.get_mut(sector)) {
                *sum += delta_e(a.0, b.0);
                *count += 1;
            }
        }
        errors
    }

    /// Adds the pixels of other images.
    pub fn merge(&mut self, other: &Self) {
        for (own, other) in self.0.iter_mut().zip(other.0) {
            own.0 += other.0;
            own.1 += other.1;
        }
    }

    /// The means of all sectors.
    pub fn sectors(&self) -> Vec<Sector> {
        let sector = |(hue, &(sum, pixels)): (&&'static str, &(f64, u64))| Sector {
            hue,
            pixels,
            delta_e: (pixels > 0).then(|| sum / pixels as f64),
        };
        SECTORS.iter().zip(&self.0).map(sector).collect()
    }
}

/// The sector of a pixel's hue; `None`: it is not saturated.
fn sector(rgb: [u8; 3]) -> Option<usize> {
    let [r, g, b] = rgb.map(|channel| f64::from(channel) / 255.0);
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    let range = most - least;
    if most < LEAST[1] || range < LEAST[0] * most {
        return None;
    }
    let hue = if most == r {
        ((g - b) / range).rem_euclid(6.0)
    } else if most == g {
        (b - r) / range + 2.0
    } else {
        (r - g) / range + 4.0
    };
    Some(hue.round() as usize % SECTORS.len())
}

/// The Euclidean distance of two sRGB colors in CIELAB (D65, 2° observer).
fn delta_e(a: [u8; 3], b: [u8; 3]) -> f64 {
    let (a, b) = (lab(a), lab(b));
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

fn lab(rgb: [u8; 3]) -> [f64; 3] {
    let linear = |channel: u8| match f64::from(channel) / 255.0 {
        c if c > 0.040_45 => ((c + 0.055) / 1.055).powf(2.4),
        c => c / 12.92,
    };
    let [r, g, b] = rgb.map(linear);
    let xyz = [
        (0.412_453 * r + 0.357_580 * g + 0.180_423 * b) / 0.950_47,
        0.212_671 * r + 0.715_160 * g + 0.072_169 * b,
        (0.019_334 * r + 0.119_193 * g + 0.950_227 * b) / 1.088_83,
    ];
    let [x, y, z] = xyz.map(|t| if t > 0.008_856 { t.cbrt() } else { 7.787 * t + 16.0 / 116.0 });
    [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    /// Against scikit-image (scripts/golden_color.py).
    #[test]
    fn differences_equal_scikit_image() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/golden/color.json")).unwrap();
        let pairs = golden["pairs"].as_array().unwrap();
        assert_eq!(pairs.len(), 96);
        for pair in pairs {
            let [a, b] = ["a", "b"].map(|name| serde_json::from_value::<[u8; 3]>(pair[name].clone()).unwrap());
            let (ours, theirs) = (delta_e(a, b), pair["delta_e"].as_f64().unwrap());
            assert!((ours - theirs).abs() < 1e-4, "{pair}: {ours}");
        }
    }

    #[test]
    fn each_hue_has_its_sector() {
        for (rgb, hue) in [
            ([255, 0, 0], Some("red")),
            ([200, 10, 40], Some("red")),
            ([255, 255, 0], Some("yellow")),
            ([0, 160, 0], Some("green")),
            ([0, 255, 255], Some("cyan")),
            ([10, 20, 200], Some("blue")),
            ([128, 0, 128], Some("magenta")),
            ([200, 190, 180], None),
            ([20, 0, 0], None),
            ([0, 0, 0], None),
        ] {
            assert_eq!(sector(rgb).map(|sector| SECTORS[sector]), hue, "{rgb:?}");
        }
    }

    #[test]
    fn only_saturated_pixels_of_the_original_count() {
        let original = RgbImage::from_fn(2, 2, |x, _| Rgb(if x == 0 { [0, 160, 0] } else { [128, 128, 128] }));
        let gray = RgbImage::from_pixel(2, 2, Rgb([90, 90, 90]));
        let mut errors = ColorErrors::of(&original, &gray);
        errors.merge(&ColorErrors::of(&original, &original));
        let green = errors.sectors()[2].clone();
        assert_eq!((green.hue, green.pixels), ("green", 4));
        assert!((green.delta_e.unwrap() - delta_e([0, 160, 0], [90, 90, 90]) / 2.0).abs() < 1e-12);
        assert!(errors.sectors().iter().filter(|sector| sector.hue != "green").all(|sector| sector.delta_e.is_none()));
    }
}
