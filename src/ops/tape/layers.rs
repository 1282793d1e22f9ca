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
        let args = [x, tape.leaf(channels, F32), tape.leaf(channels, F32)];
        let (elements, rows) = (tape.elements(x), tape.elements(x) / channels.max(1));
        if self.fused() {
            return tape.kernel(elements, self.stream, &args);
        }
        let mut forward = Tape::default();
        let (normed, weight, _) = self.normalized(&mut forward, elements, channels);
        let scaled = forward.mul(normed, weight);
        let y = forward.add_constant(scaled);
        forward.cast(y, self.stream);

        let mut backward = Tape::default();
        let dy = backward.leaf(elements, self.stream);
        let dy = backward.cast(dy, F32);
        let (normed, weight, deviation) = self.normalized(&mut backward, elements, channels);
        let products = backward.mul(dy, normed);
        for x in [products, dy] {
            backward.sums(x, channels);
        }
        let g = backward.mul(dy, weight);
        let products = backward.mul(g, normed);
        let slope = backward.sums(products, rows);
        let along = backward.mul(normed, slope);
        let mean = backward.sums(g, rows);
        let across = backward.add(g, mean);
        let difference = backward.add(across, along);
        let dx = backward.div(difference, deviation);
        backward.cast(dx, self.stream);
        // dy, x, its centred rows and the normalized ones, without casts dx and three more; three numbers for each row.
        tape.composed(&args, &forward, &backward, 4 * F32 * elements + 3 * F32 * rows)
    }

    /// The normalized rows of elements in the stream's type, the weight for each and the deviations of rows.
    fn normalized(&self, tape: &mut Tape, elements: u64, channels: u64) -> (Id, Id, Id) {
        let rows = elements / channels.max(1);
        let x = tape.leaf(elements, self.stream);
        let x = tape.cast(x, F32);
        let sums = tape.sums(x, rows);
        let mean = tape.affine(sums);
        let mean = tape.broadcast(mean, elements);
        let centred = tape.add(x, mean);
        let squares = tape.function(centred, 1);
        let sums = tape.sums(squares, rows);
        let variance = tape.affine(sums);
        let deviation = tape.function(variance, 1);
        let deviation = tape.broadcast(deviation, elements);
        let weight = tape.leaf(channels, F32);
        (tape.div(centred, deviation), tape.broadcast(weight, elements), deviation)
    }

    /// x (rows, inputs) → (rows, outputs).
    pub fn linear(&self, tape: &mut Tape, x: Id, inputs: u64, outputs: u64) -> Id {
        let bias = tape.leaf(outputs, F32);
        self.linear_of(tape, x, [inputs, outputs], Some(bias))
    }

    fn linear_of(&self, tape: &mut Tape, x: Id, [inputs, outputs]: [u64; 2], bias: Option<Id>) -> Id {
        let weight = tape.leaf(inputs * outputs, self.weight);
        let rows = tape.elements(x) / inputs.max(1);
        let [of_x, of_y, of_w] = [rows * inputs, rows * outputs, inputs * outputs];
        let factor = |tape: &mut Tape, elements, width| {
            let x = tape.leaf(elements, width);
            tape.cast(x, self.factor)
        };
        let mut forward = Tape::default();
        let (x_factor, w_factor) = (factor(&mut forward, of_x, self.stream), factor(&mut forward, of_w, self.weight));
        let y = forward.matmul(x_factor, w_factor, of_y, inputs);
        let y = forward.cast(y, self.stream);
        let bias_width = bias.map(|bias| tape.width(bias));
        if let Some(width) = bias_width {
            let bias = forward.leaf(outputs, width);
            let bias = forward.cast(bias, self.stream);
            let bias = forward.broadcast(bias, of_y);
            forward.add(y, bias);
        }

        let mut backward = Tape::default();
        let (dy, w) = (factor(&mut backward, of_y, self.stream), factor(&mut backward, of_w, self.weight));
        let dx = backward.matmul(dy, w, of_x, outputs);
        backward.cast(dx, self.stream);
        let x_factor = factor(&mut backward, of_x, self.stream);
        let dw = backward.matmul(dy, x_factor, of_w, rows);
        backward.cast(dw, self.weight);
        if let Some(width) = bias_width {
            let ones = backward.leaf(rows, self.stream);
            let dy = backward.leaf(of_y, self.stream);
            let db = backward.matmul(ones, dy, outputs, rows);
            backward.cast(db, width);
        }
        // Of what is cast, both types: first with dx, then with dw.
        let cast = |elements: u64, width: u64| if width == self.factor { 0 } else { elements * self.factor };
        let dy = cast(of_y, self.stream);
        let first = cast(of_w, self.weight)
            + of_x * self.factor
            + if self.stream == self.factor { 0 } else { of_x * self.stream };
        let dw = of_w * self.weight + cast(of_w, self.weight);
        let second = of_x * self.stream + cast(of_x, self.stream) + dw;
        let args: Vec<Id> = [x, weight].into_iter().chain(bias).collect();
        tape.composed(&args, &forward, &backward, dy + first.max(second))
    }

    /// gelu(linear(x)).
    pub fn linear_gelu(&self, tape: &mut Tape, x: Id, inputs: u64, outputs: u64) -> Id {
        if self.fused() {
            let y = self.linear_of(tape, x, [inputs, outputs], None);
            let bias = tape.leaf(outputs, F32);
            let bias = tape.cast(bias, self.stream);
            return tape.kernel(tape.elements(y), self.stream, &[y, bias]);
        }
        let bias = tape.leaf(outputs, F32);
        let bias = tape.cast(bias, self.stream);
        let y = self.linear_of(tape, x, [inputs, outputs], Some(bias));
        let elements = tape.elements(y);
        let input = |tape: &mut Tape| {
            let x = tape.leaf(elements, self.stream);
            tape.cast(x, F32)
        };
        let mut forward = Tape::default();
        let x = input(&mut forward);
        let mut gate = x;
        for _ in 0..2 {
            gate = forward.affine(gate); // the square and its multiple
        }
        gate = forward.mul(x, gate);
        gate = forward.add(gate, x);
        for _ in 0..3 {
            gate = forward.affine(gate); // a multiple, tanh, plus 1
        }
        let product = forward.mul(x, gate);
        let half = forward.affine(product);
        forward.cast(half, self.stream);

        let mut backward = Tape::default();
        let x = input(&mut backward);
        let square = backward.affine(x);
        let argument = backward.affine(square);
        let argument = backward.mul(x, argument);
        let tanh = backward.affine(argument);
        let rise = backward.affine(square);
        let rise = backward.mul(x, rise);
        let flat = backward.affine(tanh);
        let flat = backward.affine(flat);
        let inner = backward.mul(rise, flat);
        let slope = backward.add(tanh, inner);
        let slope = backward.affine(slope);
        let dy = input(&mut backward);
        let dx = backward.mul(dy, slope);
        backward.cast(dx, self.stream);
        // x where it is cast, and four others.
        let held = if self.stream == F32 { 4 } else { 5 };
        tape.composed(&[y], &forward, &backward, held * F32 * elements)
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
        let elements = tape.elements(logits);
        let input = |tape: &mut Tape| {
            let logits = tape.leaf(elements, self.stream);
            let wide = tape.cast(logits, F32);
            let largest = tape.sums(wide, rows);
            let shifted = tape.add(wide, largest);
            let exponentials = tape.affine(shifted);
            (shifted, exponentials, tape.sums(exponentials, rows))
        };
        let mut forward = Tape::default();
        let (shifted, _, sums) = input(&mut forward);
        let chosen = forward.sums(shifted, rows);
        let losses = forward.add(sums, chosen);
        let weighted = forward.affine(losses);
        forward.sums(weighted, 1);

        let mut backward = Tape::default();
        let (_, exponentials, sums) = input(&mut backward);
        let scaled = backward.mul(exponentials, sums);
        let scattered = backward.affine(scaled);
        backward.cast(scattered, self.stream);
        // The logits where they are cast, exponentials, their multiple, and that with the targets.
        let held = if self.stream == F32 { 3 } else { 4 };
        tape.composed(&[logits], &forward, &backward, held * F32 * elements)
    }
}
