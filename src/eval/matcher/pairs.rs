//! Pairs of which half are shuffled: each image once with its own caption, once with that of another sample.

use super::Samples;
use crate::{
    error::{Context, Result, failed},
    random::Random,
};

/// Random draws of another caption before all are looked through.
const DRAWS: u64 = 64;

/// The cosine of an image and a caption, and whether they are a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    pub cosine: f64,
    pub is_pair: bool,
}

/// Two pairs for each of `chosen`: with its first caption, and with the first caption of another of them that is not a
/// caption of the image.
///
/// # Errors
/// All of them have the same captions.
pub fn half_shuffled(samples: &Samples, chosen: &[usize], seed: u64) -> Result<Vec<Pair>> {
    let mut pairs = Vec::with_capacity(2 * chosen.len());
    for sample in chosen {
        pairs.push((*sample, samples.first_caption(*sample)?));
        pairs.push((*sample, another(samples, *sample, chosen, seed)?));
    }
    let cosines = samples.cosines(&pairs)?;
    Ok(cosines.into_iter().enumerate().map(|(i, cosine)| Pair { cosine, is_pair: i % 2 == 0 }).collect())
}

fn another(samples: &Samples, sample: usize, chosen: &[usize], seed: u64) -> Result<usize> {
    let caption = |at: usize| samples.first_caption(*chosen.get(at).context("no samples")?);
    let mut random = Random::keyed(seed, "shuffled pairs", 0, sample as u64);
    let drawn = (0..DRAWS).map(|_| random.below(chosen.len() as u64) as usize);
    for at in drawn.chain(0..chosen.len()) {
        let caption = caption(at)?;
        if !samples.has(sample, caption) {
            return Ok(caption);
        }
    }
    Err(failed("all samples have the same caption", "shuffled pairs need data with different captions"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};

    /// Captions are rows of the unit matrix, and so are the images of the first ones.
    fn samples(captions: &[&[usize]]) -> Samples {
        let unit = Tensor::eye(4, DType::F32, &Device::Cpu).unwrap();
        let first: Vec<u32> = captions.iter().map(|rows| rows[0] as u32).collect();
        let images = unit.index_select(&Tensor::new(first, &Device::Cpu).unwrap(), 0).unwrap();
        let captions: Vec<Vec<usize>> = captions.iter().map(|rows| rows.to_vec()).collect();
        Samples { images, texts: Some(unit), labels: vec![None; captions.len()], captions }
    }

    #[test]
    fn shuffled_captions_are_never_those_of_the_image() {
        let samples = samples(&[&[0], &[0, 1], &[1], &[2, 0], &[3]]);
        for seed in 0..20 {
            let pairs = half_shuffled(&samples, &[0, 1, 2, 3, 4], seed).unwrap();
            assert_eq!(pairs.len(), 10);
            for (i, pair) in pairs.iter().enumerate() {
                assert_eq!((pair.is_pair, pair.cosine), (i % 2 == 0, if i % 2 == 0 { 1.0 } else { 0.0 }));
            }
        }
        assert!(half_shuffled(&samples, &[0, 1], 0).is_err());
        assert!(half_shuffled(&samples, &[0, 2], 0).is_ok());
    }
}
