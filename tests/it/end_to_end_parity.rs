//! An end-to-end generator compared with PyTorch: pixels, both losses and all gradients.
//!
//! `tests/golden/end_to_end.safetensors` is written by `scripts/golden_end_to_end.py`: the transformer shares no code with
//! this crate, the reconstructor is taming-transformers' own.

use candle_core::{DType, Device, Tensor, safetensors};
use std::{collections::HashMap, rc::Rc};
use vilg::{
    config::{Config, HiddenState, ImageTokenizer, Model, Precision, Task},
    error::{Context, Result},
    model::{Batch, Generator, Tokens, end_to_end::RECONSTRUCTOR},
    nn::params::Scope,
    tokenizer::PixelBatch,
    train::{engine, shards::Shards},
};

type Tensors = HashMap<String, Tensor>;

fn config(hidden: HiddenState) -> Config {
    let mut config = Config { task: Task::EndToEnd, ..Config::default() };
    config.text.max_tokens = 7;
    config.model = Model { layers: 4, hidden: 32, heads: 4, mlp_ratio: 2, conv_size: 3, ..Model::default() };
    (config.end_to_end.hidden, config.end_to_end.map_width) = (hidden, 10);
    config.image_tokenizer = ImageTokenizer {
        image_size: 8,
        channels: 32,
        channel_multipliers: vec![1, 1],
        residual_blocks: 1,
        attention_sides: vec![],
        latent_channels: 8,
        codebook_size: 17,
        code_dim: 3,
        l1_weight: 0.7,
        l2_weight: 1.0,
        ..ImageTokenizer::default()
    };
    config
}

fn batch(golden: &Tensors) -> Result<Batch> {
    let lengths = golden["text_lengths"].to_vec1::<i64>()?.into_iter().map(|length| length as usize).collect();
    let text = Tokens { ids: golden["text"].to_dtype(DType::U32)?, lengths };
    Batch::text_to_image(text, golden["codes"].to_dtype(DType::U32)?)
}

fn largest(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

#[test]
fn losses_pixels_and_gradients_equal_pytorch() -> Result<()> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/end_to_end.safetensors");
    let golden = safetensors::load(path, &Device::Cpu)?;
    for (hidden, name) in [(HiddenState::Input, "input"), (HiddenState::Predict, "predict")] {
        let weights = golden.iter().filter_map(|(name, t)| Some((name.strip_prefix("weight.")?.to_owned(), t.clone())));
        let scope = Scope::from_tensors(weights.collect(), DType::F32, &Device::Cpu);
        let generator = Generator::new(&scope, &config(hidden), 23, 17, (4, 4))?;
        scope.finish()?;
        let get = |what: &str| golden.get(&format!("{name}.{what}")).with_context(|| format!("no {name}.{what}"));

        let pixels = generator.reconstruct(batch(&golden)?)?;
        let difference = largest(&(&pixels - get("reconstructed")?)?)?;
        assert!(difference < 1e-4, "{name}: pixels differ by {difference:e}");

        for chain in [generator.segments(), generator.autograd_segments(Precision::F32)] {
            let mut batch = generator.end_to_end().context("no reconstructor")?.arrange(batch(&golden)?);
            batch.loss_scale /= batch.targets() as f64;
            let seen = Rc::new(PixelBatch::new(golden["pixels"].clone(), 1.0));
            batch.pixels = Some(seen.clone());
            let mut shards = Shards::alone(&chain)?;
            let loss = engine::accumulate(&chain, &batch, 0, &mut shards)?;
            let [generation, reconstruction] =
                [get("generation")?.to_scalar::<f64>()?, get("reconstruction")?.to_scalar::<f64>()?];
            assert!((loss - generation - reconstruction).abs() < 1e-5 * loss, "{name}: {loss}");
            let ours = seen.statistics.take().context("no statistics")?.term("reconstruction");
            assert!((ours - reconstruction).abs() < 1e-5 * reconstruction, "{name}: {ours} {reconstruction}");
            for param in scope.params().keys().filter(|param| !param.starts_with("text_head.")) {
                let ours = shards.reduced().get(param).with_context(|| format!("`{param}` has no gradient"))?;
                let expected = get(&format!("gradient.{param}"))?.to_dtype(DType::F32)?;
                let difference = largest(&(ours - &expected)?)? / largest(&expected)?.max(1e-3);
                // Those of the reconstructor are stored in two bytes.
                let bound = if param.starts_with(RECONSTRUCTOR) { 2e-3 } else { 2e-5 };
                assert!(difference < bound, "{name} {param}: {difference:e}");
            }
        }
    }
    Ok(())
}
