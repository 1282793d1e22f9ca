//! How long many images take to generate on a cluster, by a roofline: a step of decoding reads all weights once for the
//! whole batch, and the cached keys and values of each candidate, unless its FLOPs take longer.

use super::{memory::Cluster, sizes::Sizes};
use crate::{config::Config, model::flops, nn::pattern::Pattern};
use serde::Serialize;

/// Bytes of a number: weights and cache are bf16.
const BYTES: f64 = 2.0;

/// The images to generate.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Generation {
    pub images: u64,
    /// Candidates of each image.
    pub best_of: u64,
    /// Candidates that a GPU decodes together.
    pub batch: u64,
    /// Memory bandwidth of a GPU in TB/s.
    pub bandwidth: f64,
}

/// The time that they take, without ranking, the image tokenizer's decoder, and saving.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DecodingTime {
    /// Codes of an image: steps of decoding.
    pub steps: u64,
    /// Milliseconds of a step that reading weights takes, that reading the cache takes, and that FLOPs take.
    pub weights_ms: f64,
    pub cache_ms: f64,
    pub compute_ms: f64,
    /// Hours for all images on all GPUs.
    pub hours: f64,
}

impl DecodingTime {
    /// `None`: the configuration trains no text-to-image sequences.
    pub fn of(config: &Config, sizes: &Sizes, cluster: &Cluster, wanted: Generation) -> Option<Self> {
        let sequences = sizes.spec.sequences(config, &sizes.inputs);
        let of_images = sequences.into_iter().find(|all| all.name == "text to image")?;
        let layout = of_images.layout;
        let steps = layout.predicted().max(1) as f64;
        let parameters: u64 = sizes.parts().iter().map(|(_, count)| count).sum();
        let patterns = (1..=config.model.layers).map(|layer| Pattern::of_layer(layer, &config.model));
        // Scores and weighted values are four FLOPs for each of the hidden numbers of a key and of a value: two numbers.
        let attention: f64 =
            patterns.map(|pattern| flops::attention(config.model.hidden, &flops::keys(&layout, pattern))).sum();
        let cache = attention / 2.0 * BYTES;
        let (batch, bytes_per_ms) = (wanted.batch.max(1) as f64, wanted.bandwidth * 1e9);
        let flops = flops::sequence(&config.model, &layout, of_images.outputs);
        let weights_ms = parameters as f64 * BYTES / bytes_per_ms;
        let cache_ms = batch * cache / steps / bytes_per_ms;
        let compute_ms = batch * flops / steps / (cluster.tflops * 1e9 * cluster.mfu);
        let candidates = wanted.images.saturating_mul(wanted.best_of.max(1)) as f64;
        let batches = (candidates / (batch * cluster.gpus.max(1) as f64)).ceil();
        let hours = batches * steps * (weights_ms + cache_ms).max(compute_ms) / 3.6e6;
        Some(Self { steps: steps as u64, weights_ms, cache_ms, compute_ms, hours })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AttentionKind;

    /// Against figures by hand: 10 B of bf16 weights at 2 TB/s take 10 ms, and an attention that sees n keys at step n
    /// reads n · 2 · hidden numbers in each layer.
    #[test]
    fn a_small_batch_is_bound_by_the_weights_and_a_dense_cache_grows_with_the_image() {
        let mut config = Config::default();
        (config.model.layers, config.model.hidden, config.model.heads) = (3, 64, 1);
        config.model.attention = AttentionKind::Dense;
        config.text.max_tokens = 8;
        let sizes = Sizes::of(&config).unwrap();
        let cluster = Cluster { gpus: 4, memory_bytes: 0, tflops: 100.0, mfu: 0.5 };
        let wanted = Generation { images: 1000, best_of: 60, batch: 64, bandwidth: 2.0 };
        let found = DecodingTime::of(&config, &sizes, &cluster, wanted).unwrap();
        let parameters: u64 = sizes.parts().iter().map(|(_, count)| count).sum();
        assert!((found.weights_ms - parameters as f64 * 2.0 / 2e9).abs() < 1e-12);
        let codes = found.steps as f64;
        // The text before the image, and each code up to its own position; the text's own positions are counted, too.
        let text = 8.0;
        let (least, most) = (codes * (codes + 1.0) / 2.0, codes * (codes + 1.0) / 2.0 + (codes + text) * text);
        let keys = found.cache_ms * 2e9 / 64.0 * codes / (3.0 * 2.0 * 64.0 * 2.0);
        assert!(keys > least - codes && keys <= most, "{keys}: {least} to {most}");
        let one = DecodingTime::of(&config, &sizes, &cluster, Generation { batch: 1, ..wanted }).unwrap();
        assert!(one.compute_ms * 63.9 < found.compute_ms && one.weights_ms == found.weights_ms);
        let step = (found.weights_ms + found.cache_ms).max(found.compute_ms);
        // 60,000 candidates in batches of 64 on four GPUs: 235 batches.
        assert!((found.hours - 235.0 * codes * step / 3.6e6).abs() < 1e-9 * found.hours);
    }
}
