//! The generator compared with PyTorch: logits of both directions, all gradients, ten training losses.
//!
//! `tests/golden/transformer.safetensors` is written by `scripts/golden_transformer.py`, which shares no code with this
//! crate.

use candle_core::{DType, Device, Tensor, safetensors};
use std::collections::HashMap;
use vilg::{
    config::{Config, ConvBorder, Model, Precision, RowExtent, Train},
    error::{Context, Result},
    model::{Batch, Generator, Tokens},
    nn::{
        params::{Params, Scope},
        segment::Chain,
    },
    train::{engine, optimizer, shards::Shards},
};

/// Modality of the target.
pub const TARGETS: [&str; 2] = ["image", "text"];

/// The tensors of a golden file.
pub struct Golden(pub HashMap<String, Tensor>);

impl Golden {
    pub fn load() -> Result<Self> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/transformer.safetensors");
        Ok(Self(safetensors::load(path, &Device::Cpu)?))
    }

    /// The tensors whose names begin with `prefix`, without it.
    pub fn below(&self, prefix: &str) -> HashMap<String, Tensor> {
        self.0.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t.clone()))).collect()
    }

    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.0.get(name).with_context(|| format!("the golden file has no `{name}`"))
    }

    pub fn batch(&self, target: &str) -> Result<Batch> {
        let lengths = self.get("text_lengths")?.to_vec1::<i64>()?;
        let lengths = lengths.into_iter().map(|length| length as usize).collect();
        let text = Tokens { ids: self.get("text")?.to_dtype(DType::U32)?, lengths };
        let codes = self.get("codes")?.to_dtype(DType::U32)?;
        let mut batch = match target {
            "image" => Batch::text_to_image(text, codes)?,
            _ => Batch::image_to_text(codes, text)?,
        };
        batch.loss_scale /= batch.targets() as f64;
        Ok(batch)
    }

    fn generator(&self, variant: &str, config: &Config) -> Result<(Generator, Params)> {
        let weights = self.below(&format!("{variant}.weight."));
        let scope = Scope::from_tensors(weights, DType::F32, &Device::Cpu);
        let generator = Generator::new(&scope, config, 23, 17, (3, 5))?;
        scope.finish()?;
        Ok((generator, scope.params()))
    }
}

/// The script's variants.
pub fn variants() -> [(&'static str, Config); 2] {
    let mut plain = Config::default();
    plain.text.max_tokens = 7;
    plain.model = Model { layers: 4, hidden: 32, heads: 4, mlp_ratio: 2, conv_size: 3, ..Model::default() };
    plain.train =
        Train { learning_rate: 3e-3, betas: [0.9, 0.96], weight_decay: 0.2, clip_norm: 1.5, ..Train::default() };
    let mut options = plain.clone();
    options.model = Model {
        layers: 2,
        conv_size: 5,
        row_extent: RowExtent::SameRow,
        conv_border: ConvBorder::RasterWrap,
        qk_norm: true,
        sandwich_norm: true,
        ..plain.model.clone()
    };
    [("plain", plain), ("options", options)]
}

/// |a − b| relative to the largest |b|, or to 1e-3 if all values are smaller: the bias of the k-norm has no effect, so
/// its gradient is rounding error in both implementations.
pub fn error(a: &Tensor, b: &Tensor) -> Result<f64> {
    let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>();
    assert_eq!(a.dims(), b.dims());
    Ok(largest(&(a - b)?)? / largest(b)?.max(1e-3))
}

/// Gradients of the summed loss over both directions, and the loss.
pub fn accumulate(golden: &Golden, chain: &Chain<Batch>, shards: &mut Shards) -> Result<f64> {
    shards.begin(0);
    TARGETS.into_iter().map(|target| engine::accumulate(chain, &golden.batch(target)?, 0, shards)).sum()
}

/// The losses of `steps` training steps on the same batches.
fn losses(golden: &Golden, chain: &Chain<Batch>, config: &Config, steps: u64) -> Result<Vec<f64>> {
    let mut shards = Shards::alone(chain)?;
    let mut adam = optimizer::Optimizer::new(&shards, &config.train)?;
    let step = |step: u64| {
        let loss = accumulate(golden, chain, &mut shards)?;
        let norm = optimizer::squares(shards.reduced(), shards.params())?.sqrt();
        let scale = optimizer::GradientScale::new(norm, config.train.clip_norm, 1.0);
        adam.step(&mut shards, &config.train, step, 1.0, scale)?;
        Ok(loss)
    };
    (1..=steps).map(step).collect()
}

#[test]
fn logits_and_gradients_equal_pytorch() -> Result<()> {
    let golden = Golden::load()?;
    for (variant, config) in variants() {
        let (generator, params) = golden.generator(variant, &config)?;
        for target in TARGETS {
            let logits = generator.logits(&golden.batch(target)?)?;
            let error = error(&logits, golden.get(&format!("{variant}.logits.{target}"))?)?;
            assert!(error < 1e-5, "{variant} {target}: {error:e}");
        }
        let chain = generator.segments();
        let mut shards = Shards::alone(&chain)?;
        accumulate(&golden, &chain, &mut shards)?;
        for name in params.keys() {
            let ours = shards.reduced().get(name).with_context(|| format!("`{name}` has no gradient"))?;
            let expected = golden.get(&format!("{variant}.gradient.{name}"))?;
            let error = error(ours, expected)?;
            assert!(error < 5e-5, "{variant} {name}: {error:e}");
        }
    }
    Ok(())
}

#[test]
fn ten_training_losses_equal_pytorch() -> Result<()> {
    let golden = Golden::load()?;
    for (variant, config) in variants() {
        let (generator, _) = golden.generator(variant, &config)?;
        let expected = golden.get(&format!("{variant}.losses"))?.to_vec1::<f64>()?;
        let losses = losses(&golden, &generator.segments(), &config, expected.len() as u64)?;
        for (step, (loss, expected)) in losses.iter().zip(expected).enumerate() {
            assert!((loss - expected).abs() < 1e-5 * expected, "{variant} step {step}: {loss} {expected}");
        }
    }
    Ok(())
}

/// Training with manual and with autograd segments stays equal over a short run.
#[test]
fn two_hundred_losses_equal_autograd() -> Result<()> {
    let golden = Golden::load()?;
    for (variant, config) in variants() {
        let manual = losses(&golden, &golden.generator(variant, &config)?.0.segments(), &config, 200)?;
        let autograd =
            losses(&golden, &golden.generator(variant, &config)?.0.autograd_segments(Precision::F32), &config, 200)?;
        assert!(manual[199] < 0.5 * manual[0], "{variant}: nothing is learned: {manual:?}");
        for (step, (a, b)) in manual.iter().zip(&autograd).enumerate() {
            assert!((a - b).abs() < 1e-3 * b.abs().max(0.1), "{variant} step {step}: {a} and {b}");
        }
    }
    Ok(())
}
