//! Norms, linear layers and activations as devices compute them.

use super::{Id, Tape};
use crate::runtime::Kernels;

/// How layers compute on a device.
#[derive(Debug, Clone, Copy)]
pub struct Layers {
    pub kernels: Kernels,
    /// Bytes of an element of the residual stream: 2 in bf16.
    pub stream: u64,
    /// Bytes of an element of the factors of products.
    pub factor: u64,
    /// Bytes of an element of the weights of linear layers in memory.
    pub weight: u64,
}

const F32: u64 = 4;

impl Layers {
    pub(in crate::ops) fn fused(&self) -> bool {
        self.kernels == Kernels::Fused
    }

    /// x (rows, channels) in the stream's type → the same.
    pub fn layer_norm(&self, tape: &mut Tape, x: Id, channels: u64) -> Id {
        let (weight, bias) = (tape.leaf(channels, F32), tape.leaf(channels, F32));
        let (elements, rows) = (tape.elements(x), tape.elements(x) / channels.max(1));
        if self.fused() {
            return tape.kernel(elements, self.stream, &[x, weight, bias]);
        }
        let wide = tape.cast(x, F32);
        let mean = tape.sums(wide, rows);
        let mean = tape.affine(mean);
        let mean = tape.broadcast(mean, elements);
        let centred = tape.add(wide, mean);
        let squares = tape.function(centred, 2);
        let variance = tape.sums(squares, rows);
        let variance = tape.affine(variance);
        let variance = tape.affine(variance);
        let deviation = tape.function(variance, 2);
        let deviation = tape.broadcast(deviation, elements);
        let normed = tape.div(centred, deviation);
        let weight = tape.broadcast(weight, elements);
        let scaled = tape.mul(normed, weight);
        let bias = tape.broadcast(bias, elements);
        let y = tape.add(scaled, bias);
        tape.cast(y, self.stream)
    }

    /// x (rows, inputs) → (rows, outputs).
    pub fn linear(&self, tape: &mut Tape, x: Id, inputs: u64, outputs: u64) -> Id {
        let y = self.product(tape, x, inputs, outputs);
        let y = tape.cast(y, self.stream);
        let bias = tape.leaf(outputs, F32);
        self.add_bias(tape, y, bias)
    }

    fn add_bias(&self, tape: &mut Tape, y: Id, bias: Id) -> Id {
        let bias = tape.cast(bias, self.stream);
        let bias = tape.broadcast(bias, tape.elements(y));
        tape.add(y, bias)
    }

    fn product(&self, tape: &mut Tape, x: Id, inputs: u64, outputs: u64) -> Id {
        let x = tape.cast(x, self.factor);
        let x = tape.view(x);
        let weight = tape.leaf(inputs * outputs, self.weight);
        let weight = tape.cast(weight, self.factor);
        let weight = tape.view(weight);
        let rows = tape.elements(x) / inputs.max(1);
        let y = tape.matmul(x, weight, rows * outputs, inputs);
        tape.view(y)
    }

    /// gelu(linear(x)).
    pub fn linear_gelu(&self, tape: &mut Tape, x: Id, inputs: u64, outputs: u64) -> Id {
        let y = self.product(tape, x, inputs, outputs);
        let bias = tape.leaf(outputs, F32);
        if self.fused() {
            let bias = tape.cast(bias, self.stream);
            return tape.kernel(tape.elements(y), self.stream, &[y, bias]);
        }
        let y = tape.cast(y, self.stream);
        let y = self.add_bias(tape, y, bias);
        let x = tape.cast(y, F32);
        let square = tape.function(x, 2);
        let square = tape.affine(square);
        let cube = tape.mul(x, square);
        let sum = tape.add(cube, x);
        let sum = tape.affine(sum);
        let tanh = tape.function(sum, 3);
        let gate = tape.affine(tanh);
        let product = tape.mul(x, gate);
        let half = tape.affine(product);
        tape.cast(half, self.stream)
    }

    /// The residual stream plus a branch.
    pub fn residual(&self, tape: &mut Tape, x: Id, branch: Id) -> Id {
        tape.add(x, branch)
    }

    /// The norms of queries and keys: qkv (rows, 3, hidden) → the same.
    pub fn qk_norm(&self, tape: &mut Tape, qkv: Id, channels: u64) -> Id {
        let part = tape.elements(qkv) / 3;
        let [q, k, v] = [(); 3].map(|()| {
            let part = tape.narrow(qkv, part);
            tape.copy(part)
        });
        let [q, k] = [q, k].map(|x| self.layer_norm(tape, x, channels));
        tape.cat(&[q, k, v])
    }

    /// The loss of logits (rows, vocabulary), a scalar.
    pub fn cross_entropy(&self, tape: &mut Tape, logits: Id, rows: u64) -> Id {
        if self.fused() {
            // With the largest logit, the sum of exponentials and the loss of each row.
            return tape.kernel(1 + 3 * rows, F32, &[logits]);
        }
        let wide = tape.cast(logits, F32);
        let shifted = tape.add_constant(wide);
        let exponentials = tape.function(shifted, 1);
        let sums = tape.sums(exponentials, rows);
        let sums = tape.function(sums, 1);
        let chosen = tape.sums(shifted, rows);
        let losses = tape.add(sums, chosen);
        let weighted = tape.function(losses, 1);
        tape.sums(weighted, 1)
    }
}
