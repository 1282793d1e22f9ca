//! What a micro-batch of the generator keeps of its activations and works with, by formula.
//!
//! It follows the segments written by hand (`manual`, `nn::block_manual`) and the engine: each segment's input stays
//! until its backward pass, what a block saved stays where it is not to be recomputed, and a pass has its own
//! buffers. A change there wants the same change here.

use super::{manual::ROWS, sequence::Layout};
use crate::{config::Config, nn::block::BlockLayers};

/// A micro-batch of one list of spans.
#[derive(Debug, Clone)]
pub struct Micro {
    pub layout: Layout,
    pub samples: usize,
    /// Among which each target position chooses.
    pub outputs: usize,
    /// Bytes of an activation.
    pub bytes: u64,
    /// Bytes of an element of a weight's copy that products round: 0 where they make none.
    pub copied: u64,
    /// Whether gradients of earlier micro-batches with these spans are there already.
    pub again: bool,
}

/// Where in a step a moment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A segment's weights come.
    Gather,
    /// A segment computes.
    Pass,
    /// A segment's gradients go.
    Reduce,
}

/// A moment of the backward pass at which much is in memory.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    pub phase: Phase,
    /// The segment's place in the chain.
    pub segment: usize,
    /// Bytes of activations, their gradients and buffers.
    pub activations: u64,
    /// Elements of this micro-batch's gradients of the segment's parameters so far; more than there are: all of them.
    pub gradients: u64,
    /// Elements among them that the segment holds outside of the step's gradients.
    pub aside: u64,
}

impl Micro {
    /// The moments at which most is in memory, with every `activation_checkpointing`-th segment forgetting what it saved (0: none).
    pub fn moments(&self, config: &Config, activation_checkpointing: usize) -> Vec<Moment> {
        let layers = config.model.layers;
        let forgets =
            |segment: usize| activation_checkpointing > 0 && (segment + 1).is_multiple_of(activation_checkpointing);
        let saved = self.block_saved(config);
        let mut kept: u64 = (1..=layers).filter(|layer| !forgets(*layer)).map(|_| saved).sum();
        let mut moments = self.head(config, (layers as u64 + 1) * self.stream(config) + kept);
        for layer in (1..=layers).rev() {
            kept -= if forgets(layer) { 0 } else { saved };
            moments.extend(self.block(config, layer, layer as u64 * self.stream(config) + kept));
        }
        moments.extend(self.embedding(config));
        moments
    }

    /// The largest of [`Micro::moments`] in bytes of activations.
    pub fn most(&self, config: &Config, activation_checkpointing: usize) -> u64 {
        self.moments(config, activation_checkpointing).iter().map(|moment| moment.activations).max().unwrap_or(0)
    }

    /// The residual stream: one hidden size a position.
    fn stream(&self, config: &Config) -> u64 {
        self.positions() * config.model.hidden as u64 * self.bytes
    }

    fn positions(&self) -> u64 {
        (self.samples * self.layout.positions()) as u64
    }

    /// What a block keeps for its backward pass beside its input.
    fn block_saved(&self, config: &Config) -> u64 {
        let model = &config.model;
        let block = BlockLayers::of(model);
        // The outputs of qkv and fc1, the input of proj, the stream between the branches, branches before their last norm.
        let branches = if block.post.is_some() { 2 * model.hidden } else { 0 };
        let width = block.qkv.outputs + block.proj.inputs + model.hidden + block.fc1.outputs + branches;
        let log_sums = self.positions() * model.heads as u64 * 4;
        self.positions() * width as u64 * self.bytes + log_sums
    }

    /// A block's moments; `held` are the inputs of the segments up to it and what those before it saved.
    fn block(&self, config: &Config, segment: usize, held: u64) -> Vec<Moment> {
        let model = &config.model;
        let (stream, ratio) = (self.stream(config), model.mlp_ratio as u64);
        let [qkv, proj, fc1, fc2] = BlockLayers::of(model).linears().map(|linear| linear.weight() as u64);
        let normed = if model.qk_norm { 3 } else { 0 };
        let branches = if model.sandwich_norm { 2 } else { 0 };
        let saved = self.block_saved(config);
        // What an adapter adds to a layer's output, and its share of dx.
        let (low, low_mlp) = if config.lora.is_on() { (1, ratio) } else { (0, 0) };
        // Each with the gradient of the block's output, one hidden size a position.
        let widths = [
            (saved + (2 + normed + ratio + low_mlp) * stream, 0, fc1.max(fc2)), // forward (again): normed qkv, gelu, y
            (saved + (1 + 2 * ratio + low_mlp) * stream, fc2, fc2),             // gelu and its gradient
            ((8 + branches + ratio + low) * stream, fc2 + fc1, fc1),            // behind the second norm
            // Attention: qkv, output, dmiddle, doutput, dqkv; the norms of queries and keys want copies.
            ((10 + 2 * normed) * stream, fc2 + fc1 + proj, 0),
            ((7 + low) * stream, u64::MAX, qkv),
        ];
        let pass = widths.into_iter().map(|(bytes, gradients, packed)| {
            let packed = self.copied * packed;
            Moment { phase: Phase::Pass, segment, activations: held + bytes + packed, gradients, aside: 0 }
        });
        let edge = |phase, gradients| Moment { phase, segment, activations: held + stream, gradients, aside: 0 };
        std::iter::once(edge(Phase::Gather, 0)).chain(pass).chain([edge(Phase::Reduce, u64::MAX)]).collect()
    }

    /// The head finds its gradients some rows at a time in the forward pass.
    fn head(&self, config: &Config, held: u64) -> Vec<Moment> {
        let hidden = config.model.hidden as u64;
        let segment = config.model.layers + 1;
        let rows = ROWS.min(self.samples * self.layout.predicted()) as u64;
        let weights = hidden * self.outputs as u64;
        let gradients = if config.lora.is_on() { 0 } else { weights + self.outputs as u64 + 2 * hidden };
        let packed = self.copied * weights;
        let part = rows * (4 * hidden + self.outputs as u64) * self.bytes;
        let stream = self.stream(config);
        let moment =
            |phase, bytes, gradients, aside| Moment { phase, segment, activations: held + bytes, gradients, aside };
        vec![
            moment(Phase::Gather, 0, 0, 0),
            moment(Phase::Pass, stream + part + packed, gradients, gradients),
            // Added to those of earlier parts, which makes a third copy.
            moment(Phase::Pass, stream, gradients, if self.again { 2 * gradients } else { gradients }),
            moment(Phase::Reduce, stream, gradients, 0),
        ]
    }

    fn embedding(&self, config: &Config) -> [Moment; 3] {
        let activations = self.stream(config);
        let moment = |phase, gradients| Moment { phase, segment: 0, activations, gradients, aside: 0 };
        [moment(Phase::Gather, 0), moment(Phase::Pass, u64::MAX), moment(Phase::Reduce, u64::MAX)]
    }
}
