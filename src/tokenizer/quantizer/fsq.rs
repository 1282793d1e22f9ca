//! Finite scalar quantization (arXiv 2309.15505): each dimension of a latent is bounded and rounded to one of a few
//! levels. No codebook is learned, so no code can become unused by a bad initialization.

use super::Quantized;
use crate::{
    config,
    error::{Result, ensure},
};
use candle_core::{D, DType, Device, Tensor};

/// The number of levels of each dimension.
pub struct Fsq {
    /// `(dim)`
    levels: Tensor,
    sizes: Vec<u32>,
}

/// Shrinks the range slightly, so that a bounded latent can reach the outermost levels.
const MARGIN: f64 = 1e-3;

impl Fsq {
    /// The quantizer of a configuration.
    ///
    /// # Errors
    /// The product of the levels is not the codebook size.
    pub fn new(config: &config::ImageTokenizer, device: &Device) -> Result<Self> {
        let sizes = config.fsq_levels.clone();
        let product = sizes.iter().try_fold(1u32, |product, size| product.checked_mul(*size));
        ensure!(
            product == u32::try_from(config.codebook_size).ok(),
            "the product of image_tokenizer.fsq_levels is not codebook_size"
        );
        ensure!(
            sizes.len() == config.code_dim,
            "image_tokenizer.fsq_levels has {} entries, code_dim is {}",
            sizes.len(),
            config.code_dim
        );
        let levels: Vec<f32> = sizes.iter().map(|size| *size as f32).collect();
        Ok(Self { levels: Tensor::new(levels, device)?, sizes })
    }

    pub(super) fn levels(&self) -> &Tensor {
        &self.levels
    }

    /// Number of codes.
    pub fn size(&self) -> usize {
        self.sizes.iter().product::<u32>() as usize
    }

    /// Bounds latents to the range of their levels: integers are levels, the middle level is 0.
    fn bound(&self, z: &Tensor) -> Result<Tensor> {
        let half = ((&self.levels - 1.0)? * ((1.0 + MARGIN) / 2.0))?;
        // With an even number of levels, the levels are shifted by half a step.
        let even: Vec<f32> = self.sizes.iter().map(|size| if size % 2 == 0 { 0.5 } else { 0.0 }).collect();
        let offset = Tensor::new(even, z.device())?;
        let ratio = offset.div(&half)?;
        // The shift tanh(artanh(offset / half)) maps 0 to 0.
        let shift = (((&ratio + 1.0)? / (1.0 - &ratio)?)?.log()? * 0.5)?;
        Ok(z.broadcast_add(&shift)?.tanh()?.broadcast_mul(&half)?.broadcast_sub(&offset)?)
    }

    /// Levels scaled to about \[-1, 1\].
    fn scale(&self, rounded: &Tensor) -> Result<Tensor> {
        let halves: Vec<f32> = self.sizes.iter().map(|size| (size / 2) as f32).collect();
        Ok(rounded.broadcast_div(&Tensor::new(halves, rounded.device())?)?)
    }

    /// Codes `(rows)` of latents `(.., dim)`.
    pub fn encode(&self, z: &Tensor) -> Result<Tensor> {
        let rows = z.detach().reshape(((), z.dim(D::Minus1)?))?;
        self.index(&self.bound(&rows)?.round()?)
    }

    /// Codes from levels; the first dimension varies fastest.
    fn index(&self, rounded: &Tensor) -> Result<Tensor> {
        let mut basis = 1u32;
        let mut weights = Vec::new();
        for size in &self.sizes {
            weights.push(basis as f32);
            basis *= size;
        }
        let halves: Vec<f32> = self.sizes.iter().map(|size| (size / 2) as f32).collect();
        let places = rounded.broadcast_add(&Tensor::new(halves, rounded.device())?)?;
        let index = places.broadcast_mul(&Tensor::new(weights, rounded.device())?)?.sum(D::Minus1)?;
        Ok(index.round()?.to_dtype(DType::U32)?)
    }

    /// Vectors `(rows, dim)` of codes `(rows)`.
    pub fn lookup(&self, codes: &Tensor) -> Result<Tensor> {
        let codes = codes.to_vec1::<u32>()?;
        let mut places = Vec::with_capacity(codes.len() * self.sizes.len());
        for mut code in codes.iter().copied() {
            for size in &self.sizes {
                places.push((code % size) as f32 - (size / 2) as f32);
                code /= size;
            }
        }
        self.scale(&Tensor::from_vec(places, (codes.len(), self.sizes.len()), self.levels.device())?)
    }

    /// Quantizes latents `(.., dim)` with a straight-through gradient.
    pub fn forward(&self, z: &Tensor) -> Result<Quantized> {
        let bounded = self.bound(z)?;
        let rounded = bounded.round()?.detach();
        let codes = self.index(&rounded.reshape(((), z.dim(D::Minus1)?))?)?;
        let straight = (&bounded + (&rounded - bounded.detach())?)?;
        Ok(Quantized { z_q: self.scale(&straight)?, codes, losses: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{normal, values};

    fn fsq() -> Fsq {
        let config = config::ImageTokenizer {
            fsq_levels: vec![8, 5, 4],
            codebook_size: 160,
            code_dim: 3,
            ..config::ImageTokenizer::default()
        };
        Fsq::new(&config, &Device::Cpu).unwrap()
    }

    #[test]
    fn lookup_and_encode_are_inverse() -> Result<()> {
        let fsq = fsq();
        let codes = Tensor::arange(0u32, 160, &Device::Cpu)?;
        let vectors = fsq.lookup(&codes)?;
        let distinct: std::collections::BTreeSet<String> =
            vectors.to_vec2::<f32>()?.iter().map(|vector| format!("{vector:?}")).collect();
        assert_eq!(distinct.len(), 160);
        assert!(values(&vectors).iter().all(|x| (-1.0..=1.0).contains(x)));
        let halves = Tensor::new(&[4f32, 2.0, 2.0], &Device::Cpu)?;
        assert_eq!(values(&fsq.index(&vectors.broadcast_mul(&halves)?)?), values(&codes));
        Ok(())
    }

    #[test]
    fn training_uses_the_vectors_of_decoding_and_gradients_pass() -> Result<()> {
        let fsq = fsq();
        let z = normal("z", &[4, 5, 3], DType::F32);
        let quantized = fsq.forward(&z)?;
        assert_eq!(values(&quantized.codes), values(&fsq.encode(&z)?));
        let looked_up = values(&fsq.lookup(&quantized.codes)?);
        assert!(values(&quantized.z_q).iter().zip(&looked_up).all(|(a, b)| (a - b).abs() < 1e-6));
        let store = quantized.z_q.sum_all()?.backward()?;
        assert!(values(store.get(&z).unwrap()).iter().all(|d| *d > 0.0));
        // Far values give the outermost levels, and 0 gives an inner level.
        let far = Tensor::new(&[[-50f32, -50.0, -50.0], [50.0, 50.0, 50.0], [0.0, 0.0, 0.0]], &Device::Cpu)?;
        assert_eq!(values(&fsq.encode(&far)?), [0.0, 159.0, 4.0 + 8.0 * 2.0 + 40.0 * 2.0]);
        Ok(())
    }
}
