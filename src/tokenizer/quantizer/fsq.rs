//! Finite scalar quantisation (arXiv 2309.15505): each dimension of a latent is bounded and rounded to one of a few
//! levels. Nothing is learned, so no code can die.

use super::Quantized;
use crate::{
    config,
    error::{Result, ensure},
};
use candle_core::{D, DType, Device, Tensor};

/// The levels of each dimension.
pub struct Fsq {
    /// `(dim)`
    levels: Tensor,
    sizes: Vec<u32>,
}

/// Keeps the outermost levels in reach of a bounded latent.
const MARGIN: f64 = 1e-3;

impl Fsq {
    /// # Errors
    /// The levels do not make up the codebook.
    pub fn new(config: &config::ImageTokenizer, device: &Device) -> Result<Self> {
        let sizes = config.fsq_levels.clone();
        let product = sizes.iter().try_fold(1u32, |product, size| product.checked_mul(*size));
        ensure!(
            product == u32::try_from(config.codebook_size).ok(),
            "image_tokenizer.fsq_levels multiply to another number than codebook_size"
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

    /// Latents in the range of their levels: whole numbers are levels, the middle one is 0.
    fn bound(&self, z: &Tensor) -> Result<Tensor> {
        let half = ((&self.levels - 1.0)? * ((1.0 + MARGIN) / 2.0))?;
        // An even number of levels lies half a step aside.
        let even: Vec<f32> = self.sizes.iter().map(|size| if size % 2 == 0 { 0.5 } else { 0.0 }).collect();
        let offset = Tensor::new(even, z.device())?;
        let ratio = offset.div(&half)?;
        // tanh(artanh(offset / half)) keeps 0 at 0.
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

    /// The first dimension counts fastest.
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

    /// Quantises latents `(.., dim)`; gradients pass the rounding.
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
    fn every_code_has_a_vector_that_leads_back_to_it() -> Result<()> {
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
    fn training_sees_the_vectors_that_decoding_sees_and_gradients_pass() -> Result<()> {
        let fsq = fsq();
        let z = normal("z", &[4, 5, 3], DType::F32);
        let quantized = fsq.forward(&z)?;
        assert_eq!(values(&quantized.codes), values(&fsq.encode(&z)?));
        let looked_up = values(&fsq.lookup(&quantized.codes)?);
        assert!(values(&quantized.z_q).iter().zip(&looked_up).all(|(a, b)| (a - b).abs() < 1e-6));
        let store = quantized.z_q.sum_all()?.backward()?;
        assert!(values(store.get(&z).unwrap()).iter().all(|d| *d > 0.0));
        // Far out lie the outermost levels, and 0 is one of the inner ones.
        let far = Tensor::new(&[[-50f32, -50.0, -50.0], [50.0, 50.0, 50.0], [0.0, 0.0, 0.0]], &Device::Cpu)?;
        assert_eq!(values(&fsq.encode(&far)?), [0.0, 159.0, 4.0 + 8.0 * 2.0 + 40.0 * 2.0]);
        Ok(())
    }
}
