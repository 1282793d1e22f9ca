//! `y = x Wᵀ + b` for a few rows of x and weights that are packed once: the matrix products of decoding.
//!
//! With one row the product is memory-bound: bf16 weights halve its time, int8 weights quarter it. With many rows it is
//! compute-bound. Sums are in f32 for every format.

use super::packed_kernel::{Bf16Line, DEPTH, F32Line, Group, Int8Line, Line, PANEL, PANELS, ROWS, sums};
use crate::ops::{
    pointwise::gelu::gate,
    simd::{Real, multiversion},
    slices::Scatter,
};
use half::bf16;
use rayon::prelude::*;

/// Number format of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// f32, unchanged.
    F32,
    /// bf16, with 8 bits of mantissa.
    Bf16,
    /// int8 with a scale for each output.
    Int8,
}

impl Format {
    /// The name in command-line options.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

enum Lines {
    F32(Vec<F32Line>),
    Bf16(Vec<Bf16Line>),
    Int8(Vec<Int8Line>),
}

/// How the product is finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// `y = x Wᵀ + b`
    Set,
    /// `y = gelu(x Wᵀ + b)`
    Gelu,
    /// `y += x Wᵀ + b`
    Add,
}

/// A linear layer with packed weights.
pub struct PackedLinear {
    lines: Lines,
    /// Scales of int8 weights, by group like `bias`.
    scales: Vec<Group>,
    bias: Vec<Group>,
    inputs: usize,
    outputs: usize,
}

/// Number of outputs of a group.
const GROUP: usize = PANEL * PANELS;

/// Multiply-adds below which a part of a product does not pay for a thread.
const PART_WORK: usize = 1 << 16;

impl PackedLinear {
    /// Packs `weight` (outputs, inputs) and `bias` (outputs).
    ///
    /// # Panics
    /// The lengths do not match, or there are no inputs (a bug in the caller, never of user input).
    pub fn new(weight: &[f32], bias: &[f32], format: Format) -> Self {
        let outputs = bias.len();
        let inputs = weight.len() / outputs.max(1);
        assert!(inputs > 0 && weight.len() == inputs * outputs, "weights and bias do not fit");
        let (groups, depth) = (outputs.div_ceil(GROUP), inputs.div_ceil(DEPTH));
        let scale = |row: &[f32]| row.iter().fold(0f32, |largest, w| largest.max(w.abs())) / 127.0;
        let mut scales: Vec<f32> = match format {
            Format::Int8 => weight.par_chunks(inputs).map(scale).collect(),
            _ => vec![1.0; outputs],
        };
        scales.resize(groups * GROUP, 1.0);
        let at = |output: usize, input: usize| match output < outputs && input < inputs {
            true => weight[output * inputs + input],
            false => 0.0,
        };
        // The first output and the first input of each line.
        let start = |i: usize| (i / (depth * PANELS) * GROUP + i % PANELS * PANEL, i / PANELS % depth * DEPTH);
        let all = (0..groups * depth * PANELS).into_par_iter().map(start);
        let lines = match format {
            Format::F32 => {
                let of = |o, i| std::array::from_fn(|n| std::array::from_fn(|lane| at(o + lane, i + n)));
                Lines::F32(all.map(|(o, i)| F32Line(of(o, i))).collect())
            }
            Format::Bf16 => {
                let bits = |output, input| u32::from(bf16::from_f32(at(output, input)).to_bits());
                let pair = |output, input| bits(output, input) | bits(output, input + 1) << 16;
                Lines::Bf16(all.map(|(o, i)| Bf16Line(std::array::from_fn(|lane| pair(o + lane, i)))).collect())
            }
            Format::Int8 => {
                // A row of zeros has scale 0; its quotients are NaN, which becomes 0.
                let unit = |output, input| (at(output, input) / scales[output]).round() as i8;
                let of = |o, i| std::array::from_fn(|n| std::array::from_fn(|lane| unit(o + lane, i + n)));
                Lines::Int8(all.map(|(o, i)| Int8Line(of(o, i))).collect())
            }
        };
        let mut padded = bias.to_vec();
        padded.resize(groups * GROUP, 0.0);
        let grouped = |values: &[f32]| values.as_chunks().0.as_chunks().0.to_vec();
        Self { lines, scales: grouped(&scales), bias: grouped(&padded), inputs, outputs }
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// `x` (rows, inputs) → `y` (rows, outputs). The bits of a row do not depend on the other rows.
    pub fn apply(&self, y: &mut [f32], x: &[f32], finish: Finish) {
        match &self.lines {
            Lines::F32(lines) => self.product(lines, y, x, finish),
            Lines::Bf16(lines) => self.product(lines, y, x, finish),
            Lines::Int8(lines) => self.product(lines, y, x, finish),
        }
    }

    fn product<W: Line>(&self, lines: &[W], y: &mut [f32], x: &[f32], finish: Finish) {
        let rows = x.len() / self.inputs;
        assert!(x.len() == rows * self.inputs && y.len() == rows * self.outputs, "rows of another size");
        if rows == 0 {
            return;
        }
        let worth = PART_WORK.div_ceil(GROUP * self.inputs * rows);
        let y = Scatter::new(y);
        let groups = lines.par_chunks(self.inputs.div_ceil(DEPTH) * PANELS).enumerate();
        groups.with_min_len(worth).for_each(|(group, lines)| self.group(lines, group, &y, x, finish));
    }

    /// The outputs of one group, whose weights are `lines`.
    fn group<W: Line>(&self, lines: &[W], group: usize, y: &Scatter<f32>, x: &[f32], finish: Finish) {
        let rows = x.len() / self.inputs;
        let blocks = rows.div_ceil(ROWS);
        let mut workspace = [[[0.0; PANEL]; PANELS]; ROWS];
        for block in 0..blocks {
            let (start, end) = (block * rows / blocks, (block + 1) * rows / blocks);
            let workspace = &mut workspace[..end - start];
            sums(workspace, &x[start * self.inputs..end * self.inputs], lines, self.inputs);
            dress(workspace.as_flattened_mut(), &self.scales[group], &self.bias[group], finish == Finish::Gelu);
            for (row, sums) in (start..end).zip(&*workspace) {
                self.write(sums.as_flattened(), row, group * GROUP, y, finish);
            }
        }
    }

    fn write(&self, sums: &[f32], row: usize, start: usize, y: &Scatter<f32>, finish: Finish) {
        let width = GROUP.min(self.outputs - start);
        // SAFETY: the outputs of a group belong to its task alone.
        let y = unsafe { y.row(row * self.outputs + start, width) };
        match finish {
            Finish::Set | Finish::Gelu => y.copy_from_slice(&sums[..width]),
            Finish::Add => y.iter_mut().zip(sums).for_each(|(y, s)| *y += s),
        }
    }
}

multiversion! {
    /// sums (rows, panels) · scales + bias, followed by GELU if asked for.
    fn dress<T: Real, const FMA: bool>(
        sums: &mut [[T; PANEL]],
        scales: &[[T; PANEL]],
        bias: &[[T; PANEL]],
        gelu: bool,
    ) {
        for sums in sums.chunks_exact_mut(scales.len()) {
            for ((sums, scales), bias) in sums.iter_mut().zip(scales).zip(bias) {
                for n in 0..PANEL {
                    sums[n] = sums[n].fma::<FMA>(scales[n], bias[n]);
                }
                if gelu {
                    sums.iter_mut().for_each(|s| *s *= gate(*s));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Result, ops::testing::at_each_level, random::Random};

    const FORMATS: [Format; 3] = [Format::F32, Format::Bf16, Format::Int8];

    fn normal(name: &str, len: usize) -> Vec<f32> {
        let mut random = Random::keyed(3, name, 0, 0);
        (0..len).map(|_| random.normal() as f32).collect()
    }

    /// The weights as the format stores them, by its definition.
    fn stored(weight: &[f32], inputs: usize, format: Format) -> Vec<f64> {
        let row = |row: &[f32]| -> Vec<f64> {
            let scale = row.iter().fold(0f32, |m, w| m.max(w.abs())) / 127.0;
            let store = |&w: &f32| match format {
                Format::F32 => f64::from(w),
                Format::Bf16 => f64::from(bf16::from_f32(w).to_f32()),
                Format::Int8 if scale == 0.0 => 0.0,
                Format::Int8 => f64::from((w / scale).round()) * f64::from(scale),
            };
            row.iter().map(store).collect()
        };
        weight.chunks(inputs).flat_map(row).collect()
    }

    fn plain(y: &mut [f64], x: &[f32], weight: &[f64], bias: &[f32], finish: Finish) {
        let (outputs, inputs) = (bias.len(), weight.len() / bias.len());
        for (y, x) in y.chunks_mut(outputs).zip(x.chunks(inputs)) {
            for (o, y) in y.iter_mut().enumerate() {
                let products = x.iter().zip(&weight[o * inputs..]).map(|(&x, w)| f64::from(x) * w);
                let s = products.sum::<f64>() + f64::from(bias[o]);
                *y = match finish {
                    Finish::Set => s,
                    Finish::Gelu => s / (1.0 + (-1.595_769_121_605_73 * (s + 0.044715 * s.powi(3))).exp()),
                    Finish::Add => *y + s,
                };
            }
        }
    }

    #[test]
    fn packed_is_plain_at_every_level() -> Result<()> {
        at_each_level(|| {
            for (inputs, outputs) in [(1, 1), (5, 16), (33, 17), (64, 100), (200, 48), (300, 7)] {
                let (mut weight, bias) = (normal("w", inputs * outputs), normal("b", outputs));
                weight[..inputs].fill(0.0);
                for (format, rows) in FORMATS.iter().flat_map(|&f| [1, 2, 3, 4, 5, 6, 7, 16, 25].map(|r| (f, r))) {
                    let linear = PackedLinear::new(&weight, &bias, format);
                    let (weight, x) = (stored(&weight, inputs, format), normal("x", rows * inputs));
                    for finish in [Finish::Set, Finish::Gelu, Finish::Add] {
                        let mut y = normal("y", rows * outputs);
                        let mut expected: Vec<f64> = y.iter().map(|&y| f64::from(y)).collect();
                        plain(&mut expected, &x, &weight, &bias, finish);
                        linear.apply(&mut y, &x, finish);
                        for (y, e) in y.iter().zip(expected) {
                            let gap = (f64::from(*y) - e).abs();
                            assert!(gap < 2e-5 * (inputs as f64).sqrt(), "{format:?} {finish:?} {rows}: {y} {e}");
                        }
                    }
                }
            }
            Ok(())
        })
    }

    /// Errors of the formats: bf16 2⁻⁹ of a weight, int8 half a unit of 1/127 of the row's largest weight.
    #[test]
    fn formats_have_their_documented_error() {
        let (inputs, outputs) = (512, 40);
        let (weight, x) = (normal("w", inputs * outputs), normal("x", inputs));
        let run = |format| {
            let mut y = vec![0.0; outputs];
            PackedLinear::new(&weight, &vec![0.0; outputs], format).apply(&mut y, &x, Finish::Set);
            y
        };
        let exact = run(Format::F32);
        let error = |format| {
            let squares = run(format).iter().zip(&exact).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            (squares / outputs as f64).sqrt() / (inputs as f64).sqrt()
        };
        let (bf16, int8) = (error(Format::Bf16), error(Format::Int8));
        assert!((1e-4..3e-3).contains(&bf16) && (2e-3..1.5e-2).contains(&int8), "{bf16} {int8}");
    }

    #[test]
    fn results_depend_neither_on_other_rows_nor_on_threads() -> Result<()> {
        at_each_level(|| {
            let (inputs, outputs, rows) = (300, 1000, 23);
            let (weight, bias, x) = (normal("w", inputs * outputs), normal("b", outputs), normal("x", rows * inputs));
            for format in FORMATS {
                let linear = PackedLinear::new(&weight, &bias, format);
                let mut all = vec![0.0; rows * outputs];
                linear.apply(&mut all, &x, Finish::Gelu);
                for count in 1..=9 {
                    let mut some = vec![0.0; count * outputs];
                    linear.apply(&mut some, &x[..count * inputs], Finish::Gelu);
                    assert!(some == all[..count * outputs], "{format:?}: {count} of {rows} rows");
                }
            }
            Ok(())
        })?;
        let linear = PackedLinear::new(&normal("w", 300 * 1000), &normal("b", 1000), Format::F32);
        let x = normal("x", 300 * 23);
        let on = |threads: usize| -> Result<Vec<f32>> {
            let mut y = vec![0.0; 23 * 1000];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            pool.install(|| linear.apply(&mut y, &x, Finish::Set));
            Ok(y)
        };
        assert!(on(1)? == on(4)?);
        Ok(())
    }
}
