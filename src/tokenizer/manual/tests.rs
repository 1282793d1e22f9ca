//! Manual gradients equal autograd, for small tokenizers of every kind.

use crate::{
    config::{self, Precision},
    error::{Context, Result},
    nn::{gradients::Gradients, params::Scope, segment::Segment},
    ops::testing::{normal, values},
    tokenizer::{ImageTokenizer, PixelBatch, discriminator::LogitEma},
};
use candle_core::{DType, Device, Tensor};

type Chain<'a> = Vec<Box<dyn Segment<PixelBatch> + 'a>>;

/// Runs forward and backward; returns losses and codes.
fn accumulate(chain: &Chain, batch: &PixelBatch, gradients: &mut Gradients) -> Result<(Vec<f64>, Vec<u32>)> {
    let x = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
    let (z, encoded) = chain[0].forward(&x, batch)?;
    let (loss, decoded) = chain[1].forward(&z, batch)?;
    let dz = chain[1].backward(&z, batch, decoded, None, gradients)?;
    chain[0].backward(&x, batch, encoded, dz, gradients)?;
    let statistics = batch.statistics.take().context("the last segment leaves statistics")?;
    assert_eq!(statistics.latents.as_ref().map(values), Some(values(&z)));
    let numbers = values(&loss).into_iter().chain(statistics.terms.iter().map(|term| term.1)).collect();
    Ok((numbers, statistics.codes))
}

fn pixels(side: usize, name: &str) -> Result<Tensor> {
    Ok(normal(name, &[2, side, side, 3], DType::F32).tanh()?)
}

fn small() -> config::ImageTokenizer {
    config::ImageTokenizer {
        image_size: 16,
        channels: 64,
        channel_multipliers: vec![1, 2],
        residual_blocks: 1,
        attention_sides: vec![],
        latent_channels: 16,
        codebook_size: 40,
        code_dim: 6,
        l1_weight: 0.7,
        l2_weight: 1.3,
        ..config::ImageTokenizer::default()
    }
}

fn tokenizer(config: &config::ImageTokenizer, precision: Precision) -> Result<(ImageTokenizer, Scope)> {
    let scope = Scope::from_seed(5, DType::F32, &Device::Cpu).in_precision(precision);
    Ok((ImageTokenizer::in_training(&scope, config)?, scope))
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Checks each gradient to 1e-5 of its norm. Gradients that are 0 except for rounding (a bias before a norm or softmax)
/// may differ by the f32 rounding error of the whole gradient.
fn assert_same_gradients<'a>(manual: &Gradients, autograd: &Gradients, names: impl Iterator<Item = &'a String>) {
    let whole = norm(&autograd.iter().map(|(_, gradient)| norm(&values(gradient))).collect::<Vec<_>>());
    let check = |name: &String| {
        let [ours, theirs] = [manual, autograd].map(|gradients| gradients.get(name).map(values).unwrap_or_default());
        let difference: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
        let same = ours.len() == theirs.len() && norm(&difference) <= 1e-5 * norm(&theirs) + 1e-7 * whole;
        let counts = !ours.is_empty();
        (!same || !counts).then(|| format!("{name}: {:.1e} of {:.1e}", norm(&difference), norm(&theirs)))
    };
    let wrong: Vec<String> = names.filter_map(check).collect();
    assert!(wrong.is_empty(), "of {whole:.1e}: {wrong:?}");
}

#[test]
fn equals_autograd() -> Result<()> {
    let with_attention = config::ImageTokenizer { attention_sides: vec![8, 16], l2_normalize: true, ..small() };
    let deep = config::ImageTokenizer { image_size: 20, channel_multipliers: vec![1, 1, 2], ..small() };
    let one_level = config::ImageTokenizer { image_size: 5, channel_multipliers: vec![2], ..small() };
    let blocks = config::ImageTokenizer { residual_blocks: 2, legacy_beta: true, l2_normalize: true, ..small() };
    let legacy = config::ImageTokenizer { legacy_beta: true, channel_multipliers: vec![2, 1], ..small() };
    let gan_loss = config::ImageTokenizer {
        image_size: 24,
        adversarial_weight: 0.8,
        discriminator_channels: 8,
        discriminator_layers: 2,
        lecam_weight: 0.1,
        ..small()
    };
    for config in [small(), with_attention, deep, one_level, blocks, legacy, gan_loss] {
        let (tokenizer, scope) = tokenizer(&config, Precision::F32)?;
        let [mut manual, mut autograd] = [Gradients::default(), Gradients::default()];
        // Two micro-batches: gradients accumulate, and the second one reuses the buffers.
        for (name, share) in [("first", 0.25), ("second", 0.75)] {
            let mut batch = PixelBatch::new(pixels(config.image_size, name)?, share);
            batch.logit_ema = Some(LogitEma { real: 0.3, fake: -0.2, accuracy: 0.5 });
            let (ours, codes) = accumulate(&tokenizer.segments(), &batch, &mut manual)?;
            let (theirs, expected) = accumulate(&tokenizer.autograd_segments(), &batch, &mut autograd)?;
            assert_eq!(codes, expected);
            assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-5 * b.abs()), "{ours:?} {theirs:?}");
        }
        assert_same_gradients(&manual, &autograd, scope.params().keys());
    }
    Ok(())
}

/// Distances of a step's gradients from those in f32, relative to their norm: manual and autograd.
fn distances_from_f32(config: &config::ImageTokenizer, precision: Precision) -> Result<[f64; 2]> {
    let step = |precision: Precision, manual: bool| -> Result<Gradients> {
        let ((tokenizer, _), mut gradients) = (tokenizer(config, precision)?, Gradients::default());
        let chain = if manual { tokenizer.segments() } else { tokenizer.autograd_segments() };
        accumulate(&chain, &PixelBatch::new(pixels(config.image_size, "x")?, 0.5), &mut gradients)?;
        Ok(gradients)
    };
    let exact = step(Precision::F32, true)?;
    let distance = |manual: bool| -> Result<f64> {
        let (rounded, mut squares, mut whole) = (step(precision, manual)?, 0.0, 0.0);
        for (name, gradient) in exact.iter() {
            let (theirs, ours) = (values(gradient), rounded.get(name).map(values).unwrap_or_default());
            assert_eq!(ours.len(), theirs.len());
            squares += ours.iter().zip(&theirs).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            whole += theirs.iter().map(|x| x * x).sum::<f64>();
        }
        Ok((squares / whole).sqrt())
    };
    Ok([distance(true)?, distance(false)?])
}

#[test]
fn f16_rounds_all_convolutions() -> Result<()> {
    let distances = distances_from_f32(&small(), Precision::F16)?;
    assert!(distances.iter().all(|distance| (2e-4..4e-3).contains(distance)), "{distances:?}");
    Ok(())
}

/// With AMX, if necessary in the emulator.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn bf16_rounds_wide_convolutions() {
    crate::ops::amx_emulator::with_amx(|| {
        let distances = distances_from_f32(&small(), Precision::Bf16).unwrap();
        assert!(distances.iter().all(|distance| (2e-3..4e-2).contains(distance)), "{distances:?}");
    });
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let config = config::ImageTokenizer { image_size: 40, ..small() };
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        pool.install(|| -> Result<Vec<Vec<f64>>> {
            let (tokenizer, scope) = tokenizer(&config, Precision::F32)?;
            let mut gradients = Gradients::default();
            accumulate(&tokenizer.segments(), &PixelBatch::new(pixels(40, "x")?, 1.0), &mut gradients)?;
            Ok(scope.params().keys().map(|name| gradients.get(name).map(values).unwrap_or_default()).collect())
        })
    };
    assert!(on(1)? == on(3)?);
    Ok(())
}
