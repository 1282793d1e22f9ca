//! The images of a step's samples as a tensor, and their augmentation.

use crate::{
    data::{Record, image::to_pixels},
    error::{Context, Result},
    random::Random,
    runtime,
};
use candle_core::Tensor;

/// The pixels of samples (samples, side, side, 3) in \[-1, 1\].
pub fn pixels(records: &[Record]) -> Result<Tensor> {
    let images: Option<Vec<_>> = records.iter().map(|record| record.image.as_ref()).collect();
    Ok(to_pixels(images.context("a sample without an image")?)?.to_device(&runtime::device()?)?)
}

/// Permutes the color channels of the image with the probability `share`, to one of the five other orders.
pub fn permute_channels(record: &mut Record, share: f64, mut random: Random) {
    const ORDERS: [[usize; 3]; 5] = [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    if random.unit() >= share {
        return;
    }
    let order = ORDERS[random.below(ORDERS.len() as u64) as usize];
    for pixel in record.image.iter_mut().flat_map(|image| image.pixels_mut()) {
        pixel.0 = order.map(|channel| pixel.0[channel]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgb, RgbImage};

    #[test]
    fn the_share_of_the_images_is_permuted_and_every_order_occurs() {
        let mut counts = std::collections::BTreeMap::new();
        for i in 0..3000 {
            let image = RgbImage::from_pixel(2, 1, Rgb([1, 2, 3]));
            let mut record = Record { image: Some(image), ..Record::default() };
            permute_channels(&mut record, 0.5, Random::keyed(1, "channels", 1, i));
            let image = record.image.unwrap();
            assert_eq!(image.get_pixel(0, 0), image.get_pixel(1, 0));
            *counts.entry(image.get_pixel(0, 0).0).or_insert(0) += 1;
        }
        let kept = counts.remove(&[1, 2, 3]).unwrap();
        assert!((1400..1600).contains(&kept), "{kept}");
        assert_eq!(counts.len(), 5);
        assert!(counts.values().all(|count| (230..370).contains(count)), "{counts:?}");
    }
}
