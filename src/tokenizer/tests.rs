use super::{
    quantizer::vector_quantizer::{VectorQuantizer, dead_codes},
    *,
};
use crate::{
    config,
    error::Context,
    nn::{
        params::{Param, Params},
        segment::Autograd,
        weights,
    },
    ops::testing::values,
};
use candle_core::{DType, Device, backprop::GradStore};
use std::collections::HashMap;

const GOLDEN: &[u8] = include_bytes!("../../tests/golden/taming_vqgan.safetensors");

/// The model of `scripts/golden_taming.py`.
fn golden_config() -> config::ImageTokenizer {
    config::ImageTokenizer {
        image_size: 16,
        channels: 32,
        channel_multipliers: vec![2, 1],
        residual_blocks: 1,
        attention_sides: vec![8],
        latent_channels: 16,
        codebook_size: 64,
        code_dim: 6,
        l1_weight: 1.0,
        ..config::ImageTokenizer::default()
    }
}

/// taming-transformers' weights under its names, and its outputs.
fn golden(file: &[u8]) -> Result<(HashMap<String, Tensor>, HashMap<String, Tensor>)> {
    let all = weights::parse(file, "golden file")?;
    let (answers, weights) = all.into_iter().partition::<HashMap<_, _>, _>(|(name, _)| name.starts_with("golden."));
    let short = |(name, tensor): (String, Tensor)| (name.trim_start_matches("golden.").to_owned(), tensor);
    Ok((weights, answers.into_iter().map(short).collect()))
}

fn nhwc(x: &Tensor) -> Result<Tensor> {
    Ok(x.permute((0, 2, 3, 1))?.contiguous()?)
}

fn assert_close(what: &str, ours: &Tensor, theirs: &Tensor, tolerance: f64) {
    assert_eq!(ours.dims(), theirs.dims(), "{what}");
    for (i, (a, b)) in values(ours).into_iter().zip(values(theirs)).enumerate() {
        assert!((a - b).abs() < tolerance, "{what}, element {i}: {a} instead of {b}");
    }
}

/// The loss of both segments, its gradients and the statistics.
fn train_step(tokenizer: &ImageTokenizer, batch: &PixelBatch) -> Result<(f64, GradStore, Statistics)> {
    let mut x = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
    x = tokenizer.segments.0.autograd(&x, batch)?;
    x = tokenizer.segments.1.autograd(&x, batch)?;
    let statistics = batch.statistics.take().context("the last segment leaves statistics")?;
    Ok((values(&x)[0], x.backward()?, statistics))
}

/// Compares each gradient with the two numbers that the golden files contain for it.
fn assert_gradients(params: &Params, gradients: &GradStore, golden: &HashMap<String, Tensor>) -> Result<()> {
    for (name, var) in params {
        let gradient = values(gradients.get(var.as_tensor()).with_context(|| name.clone())?);
        let theirs = values(&golden[&format!("gradient.{name}")]);
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let waves: f64 = gradient.iter().enumerate().map(|(i, g)| g * ((i % 1000) as f64).cos()).sum();
        // The bias of a key shifts all scores of a query equally: its true gradient is 0.
        let tolerance = 2e-4 * theirs[0] + 1e-7;
        assert!((norm - theirs[0]).abs() < tolerance, "norm of {name}: {norm}, {theirs:?}");
        assert!((waves - theirs[1]).abs() < tolerance, "{name}: {waves}, {theirs:?}");
    }
    Ok(())
}

#[test]
fn equals_taming_transformers() -> Result<()> {
    let (weights, golden) = golden(GOLDEN)?;
    let scope = Scope::from_tensors(weights, DType::F32, &Device::Cpu);
    let tokenizer = ImageTokenizer::new(&scope, &golden_config())?;
    scope.finish()?;
    let pixels = nhwc(&golden["x"])?;
    assert_close("latents", &tokenizer.latents(&pixels)?, &nhwc(&golden["z"])?, 1e-4);
    let codes = tokenizer.encode(&pixels)?;
    assert_eq!(values(&codes.flatten_all()?), values(&golden["codes"]));
    assert_close("reconstruction", &tokenizer.decode(&codes)?, &nhwc(&golden["y"])?, 1e-4);
    Ok(())
}

#[test]
fn losses_and_gradients_equal_pytorch() -> Result<()> {
    let (weights, golden) = golden(GOLDEN)?;
    let number = |name: &str| values(&golden[name])[0];
    let scope = Scope::from_tensors(weights.clone(), DType::F32, &Device::Cpu);
    let tokenizer = ImageTokenizer::new(&scope, &golden_config())?;
    let (loss, gradients, statistics) = train_step(&tokenizer, &PixelBatch::new(nhwc(&golden["x"])?, 1.0))?;
    assert!((loss - number("loss")).abs() < 1e-5, "{loss}");
    assert!((statistics.term("codebook") + statistics.term("commitment") - number("codebook_loss")).abs() < 1e-6);
    assert!((statistics.term("l1") + statistics.term("l2") + number("codebook_loss") - loss).abs() < 1e-5);
    assert_gradients(&scope.params(), &gradients, &golden)?;

    let scope = Scope::from_tensors(weights, DType::F32, &Device::Cpu);
    let legacy = ImageTokenizer::new(&scope, &config::ImageTokenizer { legacy_beta: true, ..golden_config() })?;
    let (_, _, statistics) = train_step(&legacy, &PixelBatch::new(nhwc(&golden["x"])?, 1.0))?;
    assert!((statistics.term("codebook") + statistics.term("commitment") - number("legacy_loss")).abs() < 1e-6);
    Ok(())
}

/// One loss of the generator and one of the discriminator in VQGAN's training, with all terms, λ and gradients,
/// compared with taming-transformers (scripts/golden_adversary.py).
#[test]
fn adversarial_training_equals_taming_transformers() -> Result<()> {
    let (weights, golden) = golden(include_bytes!("../../tests/golden/taming_adversary.safetensors"))?;
    let number = |name: &str| values(&golden[name])[0];
    let folder = tempfile::tempdir()?;
    super::perceptual::tests::write_hashed(folder.path())?;
    let config = config::ImageTokenizer {
        l2_weight: 0.0,
        perceptual: folder.path().display().to_string(),
        perceptual_weight: 1.0,
        adversarial_weight: 0.8,
        discriminator_channels: 8,
        discriminator_layers: 2,
        ..golden_config()
    };
    let step = |config: &config::ImageTokenizer| -> Result<_> {
        let scope = Scope::from_tensors(weights.clone(), DType::F32, &Device::Cpu);
        let tokenizer = ImageTokenizer::in_training(&scope, config)?;
        scope.finish()?;
        let mut batch = PixelBatch::new(nhwc(&golden["x"])?, 1.0);
        batch.logit_ema = Some(Default::default());
        Ok((scope.params(), train_step(&tokenizer, &batch)?))
    };
    let (params, (loss, gradients, statistics)) = step(&config)?;
    let close = |what: &str, ours: f64, theirs: f64| {
        assert!((ours - theirs).abs() < 1e-4 * theirs.abs(), "{what}: {ours} instead of {theirs}");
    };
    close("p", statistics.term("lpips"), number("p_loss"));
    close("rec", statistics.term("l1") + statistics.term("lpips"), number("rec_loss"));
    close("g", statistics.term("generator"), number("g_loss"));
    close("λ", statistics.term("adaptive_weight"), number("d_weight"));
    close("hinge", statistics.term("discriminator"), number("disc_loss"));
    close("real", statistics.term("logits_real"), number("logits_real"));
    close("fake", statistics.term("logits_fake"), number("logits_fake"));
    close("loss", loss, number("nll_loss") + number("codebook_loss"));
    assert_gradients(&params, &gradients, &golden)?;

    let vanilla = config::ImageTokenizer { adversarial_loss: config::AdversarialLoss::Vanilla, ..config };
    close("vanilla", step(&vanilla)?.1.2.term("discriminator"), number("vanilla"));
    Ok(())
}

/// Compared with OpenAI's dVAE (scripts/golden_dalle.py): codes, distribution, pixels, likelihood and its gradients.
#[test]
fn a_dvae_equals_dall_e() -> Result<()> {
    let (weights, golden) = golden(include_bytes!("../../tests/golden/dalle_dvae.safetensors"))?;
    let config = config::ImageTokenizer {
        architecture: config::Architecture::Dvae,
        quantizer: config::QuantizerKind::Gumbel,
        image_size: 32,
        channels: 8,
        channel_multipliers: vec![1, 2, 4, 8],
        residual_blocks: 1,
        codebook_size: 32,
        code_dim: 12,
        ..config::ImageTokenizer::default()
    };
    let scope = Scope::from_tensors(weights, DType::F32, &Device::Cpu);
    let tokenizer = ImageTokenizer::new(&scope, &config)?;
    scope.finish()?;
    let pixels = ((nhwc(&golden["x"])? * 2.0)? - 1.0)?;
    assert_close("logits", &tokenizer.latents(&pixels)?, &nhwc(&golden["logits"])?, 1e-4);
    let codes = tokenizer.encode(&pixels)?;
    assert_eq!(values(&codes.flatten_all()?), values(&golden["codes"].flatten_all()?));
    let reconstructed = ((tokenizer.decode(&codes)? + 1.0)? * 0.5)?;
    assert_close("reconstruction", &reconstructed, &nhwc(&golden["pixels"])?, 1e-4);

    let z_q = tokenizer.decoder.quantize.lookup(&codes.flatten_all()?)?.reshape((2, 4, 4, 12))?;
    let output = tokenizer.decoder.body.decode_to_last(&z_q)?.1;
    assert_close("distribution", &output, &nhwc(&golden["output"])?, 1e-4);
    let likelihood = dvae::negative_log_likelihood(&output, &pixels)?;
    assert!((values(&likelihood)[0] - values(&golden["nll"])[0]).abs() < 1e-5);
    let mut params = scope.params();
    params.retain(|name, _| name.starts_with("decoder."));
    assert_gradients(&params, &likelihood.backward()?, &golden)
}

fn fresh(config: &config::ImageTokenizer) -> Result<(ImageTokenizer, Scope)> {
    let scope = Scope::from_seed(5, DType::F32, &Device::Cpu);
    Ok((ImageTokenizer::new(&scope, config)?, scope))
}

#[test]
fn a_downsampling_tokenizer_has_the_grid_of_its_multipliers() -> Result<()> {
    let config = config::ImageTokenizer {
        image_size: 24,
        channel_multipliers: vec![1, 1, 1],
        attention_sides: vec![],
        l2_normalize: true,
        ..golden_config()
    };
    let (tokenizer, _) = fresh(&config)?;
    assert_eq!((tokenizer.grid(), tokenizer.codebook_size()?), ((6, 6), 64));
    let pixels = Tensor::rand(-1f32, 1.0, (2, 24, 24, 3), &Device::Cpu)?;
    let codes = tokenizer.encode(&pixels)?;
    assert_eq!(codes.dims(), [2, 36]);
    assert_eq!(tokenizer.decode(&codes)?.dims(), [2, 24, 24, 3]);
    assert!(tokenizer.decode(&codes.narrow(1, 0, 35)?).is_err(), "a code too few");
    assert!(tokenizer.decode(&Tensor::full(64u32, (1, 36), &Device::Cpu)?).is_err(), "a code that does not exist");
    assert!(fresh(&config::ImageTokenizer { image_size: 25, ..config }).is_err(), "a side that 4 does not divide");
    Ok(())
}

#[test]
fn unusable_channels_are_named() {
    let config = config::ImageTokenizer { channels: 48, ..golden_config() };
    let error = fresh(&config).err().map(|e| format!("{e:#}")).unwrap_or_default();
    assert!(error.contains("48") && error.contains("32"), "{error}");
}

#[test]
fn normalized_codes_only_depend_on_direction() -> Result<()> {
    let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
    let config = config::ImageTokenizer { l2_normalize: true, ..golden_config() };
    let quantizer = VectorQuantizer::new(&scope, &config)?;
    let z = Tensor::randn(0f32, 1.0, (50, 6), &Device::Cpu)?;
    let codes = quantizer.encode(&z)?;
    assert_eq!(values(&codes), values(&quantizer.encode(&(z * 17.0)?)?));
    for norm in values(&quantizer.lookup(&codes)?.sqr()?.sum(1)?) {
        assert!((norm - 1.0).abs() < 1e-5);
    }
    Ok(())
}

#[test]
fn only_dead_codes_restart_from_latents() -> Result<()> {
    let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
    let quantizer = VectorQuantizer::new(&scope, &config::ImageTokenizer { codebook_size: 5, ..golden_config() })?;
    let book = scope.params()["embedding.weight"].as_tensor().clone();
    let rows = || book.to_vec2::<f32>();
    let (before, z) = (rows()?, Tensor::randn(3f32, 1.0, (1, 2, 2, 6), &Device::Cpu)?);
    let latents = z.reshape((4, 6))?.to_vec2::<f32>()?;
    let mut last_used = vec![9, 0, 9, 1, 2];
    assert!(dead_codes(&mut last_used.clone(), &[0], 0, 10).is_empty(), "turned off");
    let dead = dead_codes(&mut last_used, &[0, 4, 4], 9, 10);
    assert_eq!((&dead[..], &last_used[..]), (&[1, 3][..], &[10, 10, 9, 10, 10][..]));
    quantizer.restart(&dead, &z, 7, 10)?;
    let after = rows()?;
    for code in 0..5 {
        if dead.contains(&code) {
            assert!(latents.contains(&after[code]), "code {code} is a latent of the batch");
        } else {
            assert_eq!(before[code], after[code]);
        }
    }
    Ok(())
}

#[test]
fn a_step_along_the_gradient_reduces_the_loss() -> Result<()> {
    let (tokenizer, scope) = fresh(&golden_config())?;
    let pixels = Tensor::rand(-1f32, 1.0, (2, 16, 16, 3), &Device::Cpu)?;
    let (before, gradients, _) = train_step(&tokenizer, &PixelBatch::new(pixels.clone(), 1.0))?;
    let moved = |var: &Param| -> Result<()> {
        let gradient = gradients.get(var.as_tensor()).context("a gradient")?;
        Ok(var.set(&(var.as_tensor().detach() - (gradient * 1e-3)?)?)?)
    };
    scope.params().values().try_for_each(moved)?;
    let (after, _, _) = train_step(&tokenizer, &PixelBatch::new(pixels.clone(), 1.0))?;
    assert!(after < before, "{before} -> {after}");
    Ok(())
}
