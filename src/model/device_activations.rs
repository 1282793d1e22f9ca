//! What a micro-batch of the generator keeps of its activations on a device, whose segments are those of candle's autograd,
//! and what it computes there.
//!
//! It follows `nn::block`, `head` and `embedding` op by op ([`Tape`]) and the engine. A change there wants the same change
//! here.

use super::{activations::Micro, flops::keys, head::ROWS, sequence::Layout};
use crate::{
    config::{Config, Model, Precision},
    nn::{block::BlockLayers, pattern::Pattern},
    ops::{
        attention::blockwise_tape,
        tape::{Layers, Tape, Work},
    },
    runtime::Kernels,
};

/// How a device computes in this precision.
pub fn layers_of(precision: Precision, kernels: Kernels) -> Layers {
    let (stream, factor) = match precision {
        Precision::Bf16 => (2, 2),
        Precision::F16 => (4, 2),
        Precision::F32 => (4, 4),
    };
    Layers { kernels, stream, factor, weight: factor }
}

/// The ops of a block over `samples` sequences, without low-rank adapters.
pub fn block(layers: &Layers, model: &Model, layout: &Layout, pattern: Pattern, samples: usize) -> Tape {
    let sizes = BlockLayers::of(model);
    let (positions, hidden) = (layout.positions(), model.hidden as u64);
    let rows = (samples * positions) as u64;
    let mut tape = Tape::default();
    let x = tape.leaf(rows * hidden, layers.stream);
    let linear = |tape: &mut Tape, x, size: &crate::nn::block::LinearSize| {
        layers.linear(tape, x, size.inputs as u64, size.outputs as u64)
    };
    let normed = layers.layer_norm(&mut tape, x, hidden);
    let mut qkv = linear(&mut tape, normed, &sizes.qkv);
    if let Some((channels, _)) = sizes.qk_norm {
        qkv = layers.qk_norm(&mut tape, qkv, channels as u64);
    }
    let lists = &keys(layout, pattern).lists;
    let attended = blockwise_tape::attention(layers, &mut tape, qkv, lists, [samples, positions, model.heads]);
    let mut branch = linear(&mut tape, attended, &sizes.proj);
    if sizes.post.is_some() {
        branch = layers.layer_norm(&mut tape, branch, hidden);
    }
    let x = tape.add(x, branch);
    let normed = layers.layer_norm(&mut tape, x, hidden);
    let inner = layers.linear_gelu(&mut tape, normed, sizes.fc1.inputs as u64, sizes.fc1.outputs as u64);
    let mut branch = linear(&mut tape, inner, &sizes.fc2);
    if sizes.post.is_some() {
        branch = layers.layer_norm(&mut tape, branch, hidden);
    }
    tape.add(x, branch);
    tape
}

/// Bytes of a segment's tape, and what its backward pass takes beside it.
#[derive(Clone, Copy)]
struct Bytes {
    kept: u64,
    backward: u64,
}

impl Bytes {
    fn of(tape: &Tape) -> Self {
        Self { kept: tape.kept(), backward: tape.backward_peak() }
    }
}

impl Micro {
    /// The most bytes of activations, their gradients and buffers in a step on a device, with every
    /// `activation_checkpointing`-th segment forgetting what it saved (0: none).
    pub fn most_on_device(&self, config: &Config, kernels: Kernels, activation_checkpointing: usize) -> u64 {
        let layers = layers_of(config.train.precision, kernels);
        let (model, count) = (&config.model, config.model.layers);
        let hidden = model.hidden as u64;
        let stream = (self.samples * self.layout.positions()) as u64 * hidden * layers.stream;
        let mut known: Vec<(Pattern, Bytes)> = Vec::new();
        let blocks: Vec<Bytes> = (1..=count)
            .map(|layer| {
                let pattern = Pattern::of_layer(layer, model);
                if let Some((_, bytes)) = known.iter().find(|(of, _)| *of == pattern) {
                    return *bytes;
                }
                let bytes = Bytes::of(&block(&layers, model, &self.layout, pattern, self.samples));
                known.push((pattern, bytes));
                bytes
            })
            .collect();
        let forgets =
            |segment: usize| activation_checkpointing > 0 && (segment + 1).is_multiple_of(activation_checkpointing);
        // The embedding's lookups, their sums with positions and the sequence are f32, then it has the stream's type.
        let embedding = if forgets(0) { stream } else { stream + 3 * 4 * stream / layers.stream };
        // Each kept segment has a copy of its input, too.
        let held = |layer: usize| if forgets(layer) { stream } else { blocks[layer - 1].kept + stream };
        let mut before: u64 = embedding + (1..=count).map(held).sum::<u64>();
        let mut most = before + self.head_on_device(config, &layers);
        for layer in (1..=count).rev() {
            before -= held(layer);
            let Bytes { kept, backward } = blocks[layer - 1];
            // A copy of the input, and the gradient that comes in.
            most = most.max(before + 2 * stream + kept + backward);
        }
        most
    }

    /// Calls `each` with the launches of the micro-batch on a device and how often they occur, forward, recomputed and backward:
    /// those of all blocks and the head, not of the embedding.
    pub fn work_on_device(
        &self,
        config: &Config,
        kernels: Kernels,
        activation_checkpointing: usize,
        mut each: impl FnMut(f64, &Work),
    ) {
        let (layers, model) = (layers_of(config.train.precision, kernels), &config.model);
        let forgets =
            |segment: usize| activation_checkpointing > 0 && (segment + 1).is_multiple_of(activation_checkpointing);
        let mut counts: Vec<(Pattern, [usize; 2])> = Vec::new();
        for layer in 1..=model.layers {
            let (pattern, passes) = (Pattern::of_layer(layer, model), 1 + usize::from(forgets(layer)));
            match counts.iter_mut().find(|(known, _)| *known == pattern) {
                Some((_, [forward, backward])) => (*forward, *backward) = (*forward + passes, *backward + 1),
                None => counts.push((pattern, [passes, 1])),
            }
        }
        for (pattern, [forward, backward]) in counts {
            let tape = block(&layers, model, &self.layout, pattern, self.samples);
            tape.forward_work().iter().for_each(|work| each(forward as f64, work));
            tape.backward_work().iter().for_each(|work| each(backward as f64, work));
        }
        let rows = (self.samples * self.layout.predicted()) as f64;
        let (tape, part) = self.head_tape(config, &layers);
        for work in tape.forward_work().iter().chain(&tape.backward_work()) {
            each(rows / part.max(1) as f64, work);
        }
    }

    /// The head computes some rows at a time, forward and backward.
    fn head_on_device(&self, config: &Config, layers: &Layers) -> u64 {
        let hidden = config.model.hidden as u64;
        let rows = (self.samples * self.layout.predicted()) as u64;
        let (tape, part) = self.head_tape(config, layers);
        // The states and their gradients, and a copy of those of a part.
        (2 * rows + part) * hidden * layers.stream + tape.kept() + tape.backward_peak()
    }

    /// The head over a part of the rows, and their number.
    fn head_tape(&self, config: &Config, layers: &Layers) -> (Tape, u64) {
        let (hidden, outputs) = (config.model.hidden as u64, self.outputs as u64);
        let part = ((self.samples * self.layout.predicted()) as u64).min(ROWS as u64);
        // The head's weights stay f32.
        let layers = Layers { weight: 4, ..*layers };
        let mut tape = Tape::default();
        let states = tape.leaf(part * hidden, layers.stream);
        let normed = layers.layer_norm(&mut tape, states, hidden);
        let logits = layers.linear(&mut tape, normed, hidden, outputs);
        layers.cross_entropy(&mut tape, logits, part);
        (tape, part)
    }
}
