//! Low-rank adapters compared with PyTorch and PEFT: the loss, the gradients of A and B, and the merged model.
//!
//! `tests/golden/lora.safetensors` is written by `scripts/golden_lora.py`, whose adapters are PEFT's.

use crate::transformer_parity::{Golden, TARGETS, accumulate, error, variants};
use candle_core::{DType, Device, Tensor, safetensors};
use std::collections::HashMap;
use vilg::{
    config::{Config, Lora, LoraTarget, Precision},
    error::{Context, Result},
    model::Generator,
    nn::{lora, params::Scope},
    train::shards::Shards,
};

fn config(variant: &str, config: Config) -> Config {
    let mut lora = Lora { rank: 3, alpha: 5.0, ..Lora::default() };
    if variant == "options" {
        lora.targets = vec![LoraTarget::Qkv, LoraTarget::Fc2];
    }
    Config { lora, ..config }
}

fn adapters() -> Result<Golden> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/lora.safetensors");
    Ok(Golden(safetensors::load(path, &Device::Cpu)?))
}

/// The weights of a variant with its adapters.
fn weights(variant: &str) -> Result<HashMap<String, Tensor>> {
    let mut all = Golden::load()?.below(&format!("{variant}.weight."));
    all.extend(adapters()?.below(&format!("{variant}.adapter.")));
    Ok(all)
}

fn generator(weights: HashMap<String, Tensor>, config: &Config) -> Result<Generator> {
    let scope = Scope::from_tensors(weights, DType::F32, &Device::Cpu);
    let generator = Generator::new(&scope, config, 23, 17, (3, 5))?;
    scope.finish()?;
    Ok(generator)
}

#[test]
fn loss_and_gradients_equal_peft() -> Result<()> {
    let (golden, expected) = (Golden::load()?, adapters()?);
    for (variant, plain) in variants() {
        let config = config(variant, plain);
        let generator = generator(weights(variant)?, &config)?;
        for chain in [generator.segments(), generator.autograd_segments(Precision::F32)] {
            let mut shards = Shards::alone(&chain)?;
            let loss = accumulate(&golden, &chain, &mut shards)?;
            let theirs = expected.get(&format!("{variant}.loss"))?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            assert!((loss - theirs).abs() < 1e-5 * theirs, "{variant}: {loss} {theirs}");
            let gradients = expected.below(&format!("{variant}.gradient."));
            assert_eq!(gradients.len(), if variant == "plain" { 2 * 4 * 4 } else { 2 * 2 * 2 });
            for (name, theirs) in gradients {
                let ours = shards.reduced().get(&name).with_context(|| format!("`{name}` has no gradient"))?;
                let error = error(ours, &theirs)?;
                assert!(error < 5e-5, "{variant} {name}: {error:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn merged_weights_equal_peft() -> Result<()> {
    let (golden, expected) = (Golden::load()?, adapters()?);
    for (variant, plain) in variants() {
        let mut merged = weights(variant)?;
        lora::merge_all(&mut merged, config(variant, plain.clone()).lora.scale())?;
        let error_of = error(&merged["blocks.1.attention.qkv.weight"], expected.get(&format!("{variant}.merged"))?)?;
        assert!(error_of < 1e-6, "{variant}: {error_of:e}");
        let generator = generator(merged, &plain)?;
        for target in TARGETS {
            let logits = generator.logits(&golden.batch(target)?)?;
            let error = error(&logits, expected.get(&format!("{variant}.logits.{target}"))?)?;
            assert!(error < 1e-5, "{variant} {target}: {error:e}");
        }
    }
    Ok(())
}
