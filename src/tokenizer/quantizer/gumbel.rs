//! Gumbel-softmax quantization (arXiv 1611.01144; DALL-E, arXiv 2102.12092): a code is sampled from logits, and the
//! gradient is that of the softmax of noisy logits over a temperature. Names are those of taming-transformers.

use super::{Quantized, softmax};
use crate::{
    config,
    error::Result,
    nn::params::{Init, Scope},
    random::Random,
};
use candle_core::{D, Tensor};

/// Settings of the Gumbel softmax in a training step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Relaxation {
    /// Temperature; close to 0 the softmax is nearly one-hot.
    pub temperature: f64,
    /// Weight of the KL divergence from the uniform distribution over codes.
    pub kl_weight: f64,
    /// The noise is keyed by seed, step, and the index of the batch's first image in the step.
    pub seed: u64,
    pub step: u64,
    pub first: u64,
}

/// A quantizer with logits and a codebook.
pub struct Gumbel {
    /// Weight `(codes, dim, 1, 1)` and bias `(codes)` of the projection from latents to logits; `None`: latents are
    /// logits.
    projection: Option<(Tensor, Tensor)>,
    /// `(codes, dim)`; for a dVAE the decoder's first convolution, `(dim, codes, 1, 1)`.
    codebook: Tensor,
    /// Bias added to every code vector; only for a dVAE.
    offset: Option<Tensor>,
}

impl Gumbel {
    /// The quantizer of taming-transformers.
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let (codes, dim) = (config.codebook_size, config.code_dim);
        let init = Init::Uniform((dim as f64).powf(-0.5));
        let proj = scope.at("proj");
        Ok(Self {
            projection: Some((proj.get("weight", (codes, dim, 1, 1), init)?, proj.get("bias", codes, init)?)),
            codebook: scope.at("embed").table("weight", (codes, dim), Init::Normal(1.0))?,
            offset: None,
        })
    }

    /// The quantizer of DALL-E's dVAE, whose latents are logits; `input` is the scope of the decoder's first
    /// convolution.
    pub fn of_logits(input: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let (codes, dim) = (config.codebook_size, config.code_dim);
        let codebook = input.table("w", (dim, codes, 1, 1), Init::Normal((codes as f64).powf(-0.5)))?;
        Ok(Self { projection: None, codebook, offset: Some(input.get("b", dim, Init::Zeros)?) })
    }

    /// Number of codes.
    pub fn size(&self) -> Result<usize> {
        Ok(self.codebook.dim(if self.offset.is_some() { 1 } else { 0 })?)
    }

    pub(super) fn codebook(&self) -> &Tensor {
        &self.codebook
    }

    /// The code vectors before the offset, `(codes, dim)`.
    fn vectors(&self) -> Result<Tensor> {
        match self.offset {
            Some(_) => Ok(self.codebook.flatten_from(1)?.t()?.contiguous()?),
            None => Ok(self.codebook.clone()),
        }
    }

    fn with_offset(&self, vectors: Tensor) -> Result<Tensor> {
        match &self.offset {
            Some(offset) => Ok(vectors.broadcast_add(offset)?),
            None => Ok(vectors),
        }
    }

    /// Logits `(rows, codes)` of latents `(.., dim)`.
    fn logits(&self, z: &Tensor) -> Result<Tensor> {
        let rows = z.reshape(((), z.dim(D::Minus1)?))?;
        match &self.projection {
            Some((weight, bias)) => Ok(rows.matmul(&weight.flatten_from(1)?.t()?)?.broadcast_add(bias)?),
            None => Ok(rows),
        }
    }

    /// The most likely codes `(rows)`.
    pub fn encode(&self, z: &Tensor) -> Result<Tensor> {
        Ok(self.logits(&z.detach())?.argmax(D::Minus1)?)
    }

    /// Codes `(rows)` drawn for latents `(.., dim)`: the most likely ones of noisy logits.
    pub fn draw(&self, z: &Tensor, relaxation: Relaxation) -> Result<Tensor> {
        Ok(self.noisy(&z.detach(), relaxation)?.argmax(D::Minus1)?)
    }

    /// Soft codes `(rows, codes)` of latents `(.., dim)`: the Gumbel softmax at `temperature`, with the noise of
    /// [`Gumbel::draw`].
    pub fn soft_codes(&self, z: &Tensor, temperature: f64, relaxation: Relaxation) -> Result<Tensor> {
        softmax(&(self.noisy(z, relaxation)? / temperature)?)
    }

    /// Logits `(rows, codes)` of latents `(.., dim)` with noise.
    fn noisy(&self, z: &Tensor, relaxation: Relaxation) -> Result<Tensor> {
        let logits = self.logits(z)?;
        let noise = noise(&logits, images(z)?, relaxation)?;
        Ok((logits + noise)?)
    }

    /// Vectors `(rows, dim)` of codes `(rows)`.
    pub fn lookup(&self, codes: &Tensor) -> Result<Tensor> {
        self.with_offset(self.vectors()?.index_select(codes, 0)?)
    }

    /// Samples codes for latents `(.., dim)`. The gradient is that of the softmax.
    pub fn forward(&self, z: &Tensor, relaxation: Relaxation) -> Result<Quantized> {
        let logits = self.logits(z)?;
        self.relaxed(z, &logits, &noise(&logits, images(z)?, relaxation)?, relaxation)
    }

    fn relaxed(&self, z: &Tensor, logits: &Tensor, noise: &Tensor, relaxation: Relaxation) -> Result<Quantized> {
        let soft = softmax(&((logits + noise)? / relaxation.temperature)?)?;
        let codes = soft.argmax(D::Minus1)?;
        // DALL-E decodes the soft mixture of codes; taming decodes the hard sample with the gradient of the mixture.
        let drawn = match self.projection {
            Some(_) => (&soft + (self.one_hot(&codes)? - soft.detach())?)?,
            None => soft,
        };
        let z_q = self.with_offset(drawn.matmul(&self.vectors()?)?)?;
        let mut shape = z.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = z_q.dim(1)?;
        }
        let z_q = z_q.reshape(shape)?;
        let likely = softmax(logits)?;
        let log_ratio = ((&likely * self.size()? as f64)? + 1e-10)?.log()?;
        let kl = ((likely * log_ratio)?.sum(D::Minus1)?.mean_all()? * relaxation.kl_weight)?;
        Ok(Quantized { z_q, codes, losses: vec![("kl", kl)] })
    }

    fn one_hot(&self, codes: &Tensor) -> Result<Tensor> {
        let size = self.size()?;
        let all = Tensor::arange(0u32, size as u32, codes.device())?;
        let shape = (codes.elem_count(), size);
        let hits = codes.unsqueeze(1)?.broadcast_as(shape)?.eq(&all.broadcast_as(shape)?)?;
        Ok(hits.to_dtype(self.codebook.dtype())?)
    }
}

/// Number of images of latents `(.., dim)`.
fn images(z: &Tensor) -> Result<usize> {
    Ok(if z.rank() == 4 { z.dim(0)? } else { 1 })
}

/// Gumbel noise for the logits of a number of images.
fn noise(logits: &Tensor, images: usize, relaxation: Relaxation) -> Result<Tensor> {
    let each = logits.elem_count() / images.max(1);
    let mut values = Vec::with_capacity(logits.elem_count());
    for image in 0..images as u64 {
        let mut random = Random::keyed(relaxation.seed, "gumbel noise", relaxation.step, relaxation.first + image);
        // Clamped so that ln 0 cannot occur.
        values.extend((0..each).map(|_| -(-(random.unit().max(1e-20)).ln()).max(1e-20).ln() as f32));
    }
    Ok(Tensor::from_vec(values, logits.shape(), logits.device())?.to_dtype(logits.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{nn::weights, ops::testing::values};
    use candle_core::{DType, Device, Var};

    fn close(what: &str, ours: &Tensor, theirs: &Tensor) {
        for (a, b) in values(ours).iter().zip(values(theirs)) {
            assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "{what}: {a} instead of {b}");
        }
        assert_eq!(ours.elem_count(), theirs.elem_count(), "{what}");
    }

    /// Compared with taming-transformers' GumbelQuantize (scripts/golden_gumbel.py).
    #[test]
    fn samples_and_gradients_equal_taming() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/taming_gumbel.safetensors"), "golden")?;
        let nhwc = |name: &str| golden[name].permute((0, 2, 3, 1))?.contiguous();
        let config = config::ImageTokenizer { codebook_size: 32, code_dim: 6, ..config::ImageTokenizer::default() };
        let stored = golden.iter().filter(|(name, _)| name.starts_with("proj") || name.starts_with("embed"));
        let stored = stored.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        let scope = Scope::from_tensors(stored, DType::F32, &Device::Cpu);
        let gumbel = Gumbel::new(&scope, &config)?;
        let z = Var::from_tensor(&nhwc("z")?)?;
        assert_eq!(values(&gumbel.encode(&z)?), values(&golden["eval_codes"].flatten_all()?));
        close("eval", &gumbel.lookup(&gumbel.encode(&z)?)?, &nhwc("eval_z_q")?.flatten_to(2)?);

        let relaxation = Relaxation { temperature: 0.9, kl_weight: 5e-4, ..Relaxation::default() };
        let logits = gumbel.logits(&z)?;
        let noise = nhwc("noise")?.reshape(logits.shape())?;
        let quantized = gumbel.relaxed(&z, &logits, &noise, relaxation)?;
        assert_eq!(values(&quantized.codes), values(&golden["codes"].flatten_all()?));
        close("z_q", &quantized.z_q, &nhwc("z_q")?);
        close("kl", &quantized.losses[0].1, &golden["kl"]);
        let loss = ((quantized.z_q * nhwc("c")?)?.sum_all()? + &quantized.losses[0].1)?;
        let store = loss.backward()?;
        close("dz", store.get(&z).unwrap(), &nhwc("gradient.z")?);
        for (name, var) in scope.params() {
            close(&name, store.get(&var).unwrap(), &golden[&format!("gradient.{name}")]);
        }
        Ok(())
    }

    #[test]
    fn noise_is_keyed_by_the_image_and_has_the_mean_of_gumbel() -> Result<()> {
        let logits = Tensor::zeros((40, 500), DType::F32, &Device::Cpu)?;
        let at = |first| Relaxation { temperature: 1.0, first, seed: 3, step: 5, ..Relaxation::default() };
        let all = noise(&logits, 4, at(0))?;
        let later = noise(&logits.narrow(0, 0, 20)?, 2, at(2))?;
        assert_eq!(values(&all.narrow(0, 20, 20)?), values(&later), "the same images in another batch");
        let mean = values(&all.mean_all()?)[0];
        assert!((mean - 0.5772).abs() < 0.03, "{mean}");
        Ok(())
    }
}
