//! Protocols of the FID. They differ in weights, resizing and range, and so do their figures.

use super::{
    architecture::Weights,
    inception::{self, Inception, SIDE},
};
use crate::{
    data::{self, Filter, image::to_pixels},
    error::Result,
};
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use image::RgbImage;
use rayon::prelude::*;

/// torchvision's conversion of values from 0 to 1 for weights that expect TensorFlow's range: factors and offsets of the
/// colors.
pub const IMAGENET: [[f64; 3]; 2] =
    [[0.229 / 0.5, 0.224 / 0.5, 0.225 / 0.5], [(0.485 - 0.5) / 0.5, (0.456 - 0.5) / 0.5, (0.406 - 0.5) / 0.5]];

/// How images become features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// pytorch-fid 0.3: TensorFlow's weights, bilinear resizing without antialiasing
    PytorchFid,
    /// clean-fid (arXiv 2104.11222): TensorFlow's weights, Pillow's bicubic resizing without rounding
    Clean,
    /// DM-GAN's, which ERNIE-ViLG reports: torchvision's weights, Pillow's bilinear resizing, whole batches of 50 only
    DmGan,
}

impl Protocol {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::PytorchFid => "pytorch-fid",
            Self::Clean => "clean",
            Self::DmGan => "dm-gan",
        }
    }

    /// What distinguishes its figures.
    pub fn description(self) -> &'static str {
        match self {
            Self::PytorchFid => "TensorFlow's Inception, bilinear resizing without antialiasing",
            Self::Clean => "TensorFlow's Inception, Pillow's bicubic resizing without rounding",
            Self::DmGan => "torchvision's Inception, Pillow's bilinear resizing, whole batches of 50",
        }
    }

    /// The weights that it needs.
    pub fn weights(self) -> Weights {
        match self {
            Self::PytorchFid | Self::Clean => Weights::TensorFlow,
            Self::DmGan => Weights::Torchvision,
        }
    }

    /// How many of `count` images it uses: the first ones.
    pub fn used(self, count: usize) -> usize {
        if self == Self::DmGan { count - count % 50 } else { count }
    }

    /// The features `(images, 2048)` of images of any size.
    ///
    /// # Errors
    /// There are no images, or one has no pixels.
    pub fn features(self, network: &Inception, images: &[RgbImage]) -> Result<Tensor> {
        let inputs = images.par_iter().map(|image| self.input(image)).collect::<Result<Vec<_>>>()?;
        network.forward(&Tensor::cat(&inputs, 0)?)
    }

    /// The network's input for an image, `(1, 299, 299, 3)`.
    ///
    /// # Errors
    /// The image has no pixels.
    pub fn input(self, image: &RgbImage) -> Result<Tensor> {
        let side = SIDE as u32;
        let values: Vec<f32> = match self {
            Self::PytorchFid => return inception::resize(&to_pixels([image])?),
            Self::Clean => {
                let values = data::resize_unrounded(image, Filter::Bicubic, side, side);
                values.into_iter().map(|value| (value.clamp(0.0, 255.0) - 128.0) / 128.0).collect()
            }
            Self::DmGan => {
                let resized = data::resize(image, Filter::Bilinear, side, side);
                let [factors, offsets] = IMAGENET;
                let convert = |(i, value): (usize, &u8)| f64::from(*value) / 255.0 * factors[i % 3] + offsets[i % 3];
                resized.as_raw().iter().enumerate().map(|value| convert(value) as f32).collect()
            }
        };
        Ok(Tensor::from_vec(values, (1, SIDE, SIDE, 3), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::values;
    use image::Rgb;

    #[test]
    fn inputs_have_the_range_of_their_network() -> Result<()> {
        for (protocol, black, white) in [
            (Protocol::PytorchFid, [-1.0; 3], [1.0; 3]),
            (Protocol::Clean, [-1.0; 3], [127.0 / 128.0; 3]),
            (Protocol::DmGan, [-0.03, -0.088, -0.188], [0.428, 0.36, 0.262]),
        ] {
            for (shade, expected) in [(0, black), (255, white)] {
                let input = protocol.input(&RgbImage::from_pixel(37, 50, Rgb([shade; 3])))?;
                assert_eq!(input.dims(), [1, SIDE, SIDE, 3]);
                let pixel = values(&input.narrow(1, 150, 1)?.narrow(2, 7, 1)?);
                assert!(pixel.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{protocol:?}: {pixel:?}");
            }
        }
        assert_eq!([Protocol::DmGan.used(149), Protocol::DmGan.used(49), Protocol::Clean.used(149)], [100, 0, 149]);
        Ok(())
    }
}
