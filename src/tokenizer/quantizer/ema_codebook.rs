//! EMA codebook (arXiv 1711.00937, appendix A.1): each code is the moving average of the latents assigned to it,
//! without gradients. Names are those of taming-transformers.

use super::vector_quantizer::VectorQuantizer;
use crate::{
    config,
    error::Result,
    nn::params::{Init, Scope},
    ops,
};
use candle_core::{D, Tensor};

/// Added to each count, so that a code that is rarely used stays finite (Laplace smoothing).
const EPS: f32 = 1e-5;

const COUNTS: &str = "embedding.cluster_size";
const SUMS: &str = "embedding.embed_avg";

/// Moving averages of the number of latents assigned to each code, and of their sum.
pub struct EmaCodebook {
    /// `(codes)`.
    counts: Tensor,
    /// `(codes, dim)`.
    sums: Tensor,
    decay: f32,
}

/// Whether a parameter of a tokenizer belongs to the EMA codebook, which is not part of the published model.
pub fn is_ours(name: &str) -> bool {
    name.ends_with(COUNTS) || name.ends_with(SUMS)
}

impl EmaCodebook {
    /// The EMA codebook of the quantizer in `scope`; `None` if the codebook is trained by gradients.
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Option<Self>> {
        if !config.codebook_is_averaged() {
            return Ok(None);
        }
        let (codes, dim) = (config.codebook_size, config.code_dim);
        Ok(Some(Self {
            counts: scope.statistics(COUNTS, codes, Init::Zeros)?,
            sums: scope.statistics(SUMS, (codes, dim), Init::Zeros)?,
            decay: config.codebook_decay as f32,
        }))
    }

    /// Updates the codebook with the latents `(.., dim)` of a step, assigned to `codes: (rows)`. A code that has never
    /// been used keeps its vector.
    pub fn update(&self, nearest: &VectorQuantizer, z: &Tensor, codes: &[u32]) -> Result<()> {
        let dim = z.dim(D::Minus1)?;
        let z = nearest.normalized(&z.detach())?.flatten_all()?.to_vec1::<f32>()?;
        let new = 1.0 - self.decay;
        let total = ops::with_slice_mut(&self.counts, |counts: &mut [f32]| {
            counts.iter_mut().for_each(|count| *count *= self.decay);
            codes.iter().for_each(|code| counts[*code as usize] += new);
            counts.iter().sum::<f32>()
        })?;
        ops::with_slice_mut(&self.sums, |sums: &mut [f32]| {
            sums.iter_mut().for_each(|sum| *sum *= self.decay);
            for (z, code) in z.chunks(dim).zip(codes) {
                let sums = sums.chunks_mut(dim).nth(*code as usize).unwrap_or_default();
                sums.iter_mut().zip(z).for_each(|(sum, z)| *sum += new * z);
            }
        })?;
        let (counts, sums) = (self.counts.to_vec1::<f32>()?, self.sums.flatten_all()?.to_vec1::<f32>()?);
        let smoothing = total / (total + counts.len() as f32 * EPS);
        Ok(ops::with_slice_mut(nearest.codebook(), |codebook: &mut [f32]| {
            for ((vector, sums), count) in codebook.chunks_mut(dim).zip(sums.chunks(dim)).zip(counts) {
                let smoothed = (count + EPS) * smoothing;
                if count > 0.0 {
                    vector.iter_mut().zip(sums).for_each(|(value, sum)| *value = sum / smoothed);
                }
            }
        })?)
    }

    /// Initializes the averages from a trained codebook, as if each code had been assigned once per step.
    pub fn start_at(&self, nearest: &VectorQuantizer) -> Result<()> {
        let vectors = nearest.normalized(nearest.codebook())?.flatten_all()?.to_vec1::<f32>()?;
        ops::with_slice_mut(&self.counts, |counts: &mut [f32]| counts.fill(1.0))?;
        Ok(ops::with_slice_mut(&self.sums, |sums: &mut [f32]| sums.copy_from_slice(&vectors))?)
    }

    /// Resets the averages of codes that were restarted with other vectors.
    pub fn forget(&self, codes: &[usize]) -> Result<()> {
        let dim = self.sums.dim(1)?;
        ops::with_slice_mut(&self.counts, |counts: &mut [f32]| codes.iter().for_each(|code| counts[*code] = 0.0))?;
        Ok(ops::with_slice_mut(&self.sums, |sums: &mut [f32]| {
            codes.iter().for_each(|code| sums[code * dim..(code + 1) * dim].fill(0.0));
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        nn::{params::Params, weights},
        ops::testing::values,
    };
    use candle_core::{DType, Device, Var};

    fn config() -> config::ImageTokenizer {
        config::ImageTokenizer { codebook_size: 16, code_dim: 6, codebook_decay: 0.9, ..Default::default() }
    }

    fn close(what: &str, ours: &Tensor, theirs: &Tensor) {
        assert_eq!(ours.dims(), theirs.dims(), "{what}");
        for (a, b) in values(ours).iter().zip(values(theirs)) {
            assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "{what}: {a} instead of {b}");
        }
    }

    /// Compared with two training steps of lucidrains' VectorQuantize (scripts/golden_ema_codebook.py).
    #[test]
    fn updates_equal_the_reference() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/ema_codebook.safetensors"), "golden")?;
        let stored = golden.iter().filter(|(name, _)| name.starts_with("embedding."));
        let stored = stored.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        let scope = Scope::from_tensors(stored, DType::F32, &Device::Cpu);
        let (nearest, average) =
            (VectorQuantizer::new(&scope, &config())?, EmaCodebook::new(&scope, &config())?.unwrap());
        for step in 1..=2 {
            let theirs = |name: &str| &golden[&format!("{step}.{name}")];
            let z = Var::from_tensor(theirs("z"))?;
            let quantized = nearest.forward(&z)?;
            assert_eq!(values(&quantized.codes), values(&theirs("codes").flatten_all()?));
            close("z_q", &quantized.z_q, theirs("z_q"));
            let [("commitment", loss)] = &quantized.losses[..] else { panic!("a codebook with gradients") };
            close("loss", loss, theirs("loss"));
            let store = ((&quantized.z_q * theirs("c"))?.sum_all()? + loss)?.backward()?;
            close("dz", store.get(&z).unwrap(), theirs("gradient.z"));
            average.update(&nearest, &z, &quantized.codes.to_vec1()?)?;
            let params: Params = scope.params();
            assert_eq!(params.len(), 3);
            params.iter().for_each(|(name, var)| close(name, var, theirs(name)));
        }
        Ok(())
    }

    #[test]
    fn codes_are_means_from_the_first_step_and_after_a_restart() -> Result<()> {
        let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
        let (nearest, average) =
            (VectorQuantizer::new(&scope, &config())?, EmaCodebook::new(&scope, &config())?.unwrap());
        let rows = || scope.params()["embedding.weight"].to_vec2::<f32>();
        let before = rows()?;
        let z = Tensor::new(&[[1f32; 6], [3.0; 6], [7.0; 6]], &Device::Cpu)?;
        average.update(&nearest, &z, &[4, 4, 9])?;
        let after = rows()?;
        let near = |row: &[f32], value: f32| row.iter().all(|x| (x - value).abs() < 0.01);
        assert!(near(&after[4], 2.0) && near(&after[9], 7.0), "{:?} {:?}", after[4], after[9]);
        (0..16).filter(|code| ![4, 9].contains(code)).for_each(|code| assert_eq!(before[code], after[code]));

        average.forget(&[4])?;
        average.update(&nearest, &z.narrow(0, 2, 1)?, &[9])?;
        assert_eq!(rows()?[4], after[4], "it was never used");
        average.update(&nearest, &z.narrow(0, 2, 1)?, &[4])?;
        assert!(near(&rows()?[4], 7.0), "the old vector is forgotten: {:?}", rows()?[4]);

        average.start_at(&nearest)?;
        average.update(&nearest, &z.narrow(0, 0, 1)?, &[4])?;
        assert!(near(&rows()?[4], 6.4), "nine tenths of 7: {:?}", rows()?[4]);
        Ok(())
    }
}
