//! InceptionV3 as in pytorch-fid, whose features define the FID (arXiv 1706.08500). Tensor names are torchvision's;
//! pooling is TensorFlow's: averages exclude padding, and the last block uses max pooling.

use crate::{
    error::{Hint, Result},
    nn::{
        params::{Init, Scope},
        weights,
    },
    ops::{self, Padding},
};
use Piece::{Average, Down, Fork, Largest, Square, Strip};
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;
use std::path::Path;

/// Name of the weights file in the folder of an imported network.
pub const FILE: &str = "inception.safetensors";

/// Side length to which images are resized, in pixels.
const SIDE: usize = 299;
const NORM_EPS: f64 = 1e-3;

/// One layer of a branch. Convolutions have their name in the block and their number of output channels.
#[derive(Clone, Copy)]
enum Piece {
    /// A square kernel with this side.
    Square(&'static str, usize, usize),
    /// A rectangular kernel with this height and width.
    Strip(&'static str, usize, [usize; 2]),
    /// A 3 × 3 convolution with stride 2.
    Down(&'static str, usize),
    /// A 1 × 3 and a 3 × 1 convolution in parallel, concatenated, with this many channels each.
    Fork([&'static str; 2], usize),
    /// 3 × 3 average pooling.
    Average,
    /// 3 × 3 max pooling with this stride.
    Largest(usize),
}

enum Step {
    Conv(Conv),
    Fork([Conv; 2]),
    Average,
    Largest(usize),
}

/// A convolution with batch norm folded in, followed by ReLU.
struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: Padding,
}

/// The network up to its pooled features.
pub struct Inception {
    /// Blocks of parallel branches whose outputs are concatenated.
    blocks: Vec<Vec<Vec<Step>>>,
}

impl Inception {
    /// Opens the network in a folder written by `vilg import inception`.
    ///
    /// # Errors
    /// The folder has no network, or the file is damaged.
    pub fn open(folder: &Path, device: &Device) -> Result<Self> {
        let file = folder.join(FILE);
        let hint = "`vilg import inception SRC DIR` writes such a folder";
        let bytes = weights::map(&file).hint(format!("there is no Inception network in {}", folder.display()), hint)?;
        let tensors = weights::parse(&bytes, &file.display().to_string())?;
        let scope = Scope::from_tensors(tensors, DType::F32, device);
        Self::new(&scope).hint(format!("{} is not pytorch-fid's InceptionV3", file.display()), hint)
    }

    /// The network with the parameters of `scope`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(scope: &Scope) -> Result<Self> {
        let mut channels = 3;
        let mut blocks = Vec::new();
        for (name, outputs, side, stride, pad) in [
            ("1a_3x3", 32, 3, 2, 0),
            ("2a_3x3", 32, 3, 1, 0),
            ("2b_3x3", 64, 3, 1, 1),
            ("", 0, 0, 0, 0),
            ("3b_1x1", 80, 1, 1, 0),
            ("4a_3x3", 192, 3, 1, 0),
            ("", 0, 0, 0, 0),
        ] {
            let step = if name.is_empty() {
                Step::Largest(2)
            } else {
                let scope = scope.at(format_args!("Conv2d_{name}"));
                let conv = Conv::new(&scope, [channels, outputs], [side; 2], stride, [pad; 2])?;
                channels = outputs;
                Step::Conv(conv)
            };
            blocks.push(vec![vec![step]]);
        }
        for (name, branches) in mixed() {
            let scope = scope.at(format_args!("Mixed_{name}"));
            let (mut built, mut outputs) = (Vec::new(), 0);
            for branch in branches {
                let (steps, out) = build(&scope, channels, &branch)?;
                built.push(steps);
                outputs += out;
            }
            blocks.push(built);
            channels = outputs;
        }
        Ok(Self { blocks })
    }

    /// Pixels `(batch, height, width, 3)` in \[-1, 1\] → features `(batch, 2048)`.
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = resize(pixels)?;
        for branches in &self.blocks {
            let outputs = branches.iter().map(|steps| steps.iter().try_fold(x.clone(), |x, step| step.forward(&x)));
            x = Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, D::Minus1)?;
        }
        Ok(x.flatten(1, 2)?.mean(1)?)
    }
}

/// The blocks after the first convolutions.
fn mixed() -> Vec<(&'static str, Vec<Vec<Piece>>)> {
    let a = |pool| {
        vec![
            vec![Square("branch1x1", 64, 1)],
            vec![Square("branch5x5_1", 48, 1), Square("branch5x5_2", 64, 5)],
            vec![Square("branch3x3dbl_1", 64, 1), Square("branch3x3dbl_2", 96, 3), Square("branch3x3dbl_3", 96, 3)],
            vec![Average, Square("branch_pool", pool, 1)],
        ]
    };
    let b = vec![
        vec![Down("branch3x3", 384)],
        vec![Square("branch3x3dbl_1", 64, 1), Square("branch3x3dbl_2", 96, 3), Down("branch3x3dbl_3", 96)],
        vec![Largest(2)],
    ];
    let c = |inner| {
        vec![
            vec![Square("branch1x1", 192, 1)],
            vec![
                Square("branch7x7_1", inner, 1),
                Strip("branch7x7_2", inner, [1, 7]),
                Strip("branch7x7_3", 192, [7, 1]),
            ],
            vec![
                Square("branch7x7dbl_1", inner, 1),
                Strip("branch7x7dbl_2", inner, [7, 1]),
                Strip("branch7x7dbl_3", inner, [1, 7]),
                Strip("branch7x7dbl_4", inner, [7, 1]),
                Strip("branch7x7dbl_5", 192, [1, 7]),
            ],
            vec![Average, Square("branch_pool", 192, 1)],
        ]
    };
    let d = vec![
        vec![Square("branch3x3_1", 192, 1), Down("branch3x3_2", 320)],
        vec![
            Square("branch7x7x3_1", 192, 1),
            Strip("branch7x7x3_2", 192, [1, 7]),
            Strip("branch7x7x3_3", 192, [7, 1]),
            Down("branch7x7x3_4", 192),
        ],
        vec![Largest(2)],
    ];
    let e = |pool| {
        vec![
            vec![Square("branch1x1", 320, 1)],
            vec![Square("branch3x3_1", 384, 1), Fork(["branch3x3_2a", "branch3x3_2b"], 384)],
            vec![
                Square("branch3x3dbl_1", 448, 1),
                Square("branch3x3dbl_2", 384, 3),
                Fork(["branch3x3dbl_3a", "branch3x3dbl_3b"], 384),
            ],
            vec![pool, Square("branch_pool", 192, 1)],
        ]
    };
    vec![
        ("5b", a(32)),
        ("5c", a(64)),
        ("5d", a(64)),
        ("6a", b),
        ("6b", c(128)),
        ("6c", c(160)),
        ("6d", c(160)),
        ("6e", c(192)),
        ("7a", d),
        ("7b", e(Average)),
        ("7c", e(Largest(1))),
    ]
}

/// Builds a branch; returns its steps and its number of output channels.
fn build(scope: &Scope, mut channels: usize, branch: &[Piece]) -> Result<(Vec<Step>, usize)> {
    let mut steps = Vec::new();
    for piece in branch {
        let same = |name, outputs, kernel: [usize; 2]| {
            Conv::new(&scope.at(name), [channels, outputs], kernel, 1, kernel.map(|side| side / 2))
        };
        let (step, outputs) = match *piece {
            Square(name, outputs, side) => (Step::Conv(same(name, outputs, [side; 2])?), outputs),
            Strip(name, outputs, kernel) => (Step::Conv(same(name, outputs, kernel)?), outputs),
            Down(name, outputs) => {
                (Step::Conv(Conv::new(&scope.at(name), [channels, outputs], [3; 2], 2, [0; 2])?), outputs)
            }
            Fork([a, b], outputs) => (Step::Fork([same(a, outputs, [1, 3])?, same(b, outputs, [3, 1])?]), 2 * outputs),
            Average => (Step::Average, channels),
            Largest(stride) => (Step::Largest(stride), channels),
        };
        steps.push(step);
        channels = outputs;
    }
    Ok((steps, channels))
}

impl Conv {
    fn new(scope: &Scope, channels: [usize; 2], kernel: [usize; 2], stride: usize, pad: [usize; 2]) -> Result<Self> {
        let [inputs, outputs] = channels;
        let weight = scope.at("conv").get("weight", (outputs, inputs, kernel[0], kernel[1]), Init::Zeros)?.detach();
        let norm = scope.at("bn");
        let get = |name| norm.get(name, outputs, Init::Zeros).map(|tensor| tensor.detach());
        let (gain, shift, mean, variance) = (get("weight")?, get("bias")?, get("running_mean")?, get("running_var")?);
        let scale = (gain / (variance + NORM_EPS)?.sqrt()?)?;
        let bias = (shift - (mean * &scale)?)?;
        let weight = weight.broadcast_mul(&scale.reshape((outputs, 1, 1, 1))?)?;
        let padding = Padding { top: pad[0], bottom: pad[0], left: pad[1], right: pad[1] };
        Ok(Self { weight, bias, stride, padding })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::conv2d(x, &self.weight, Some(&self.bias), self.stride, self.padding)?.relu()?)
    }
}

impl Step {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Conv(conv) => conv.forward(x),
            Self::Fork([a, b]) => Ok(Tensor::cat(&[a.forward(x)?, b.forward(x)?], D::Minus1)?),
            Self::Average => pool(x, 1, |values| values.sum::<f32>(), true),
            Self::Largest(stride) => pool(x, *stride, |values| values.fold(f32::MIN, f32::max), false),
        }
    }
}

/// 3 × 3 pooling of each channel, without padding values: with stride 1 around every pixel, else only at full windows.
/// `mean` selects average pooling.
fn pool(
    x: &Tensor,
    stride: usize,
    f: impl Fn(&mut dyn Iterator<Item = f32>) -> f32 + Sync,
    mean: bool,
) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    let border = usize::from(stride == 1);
    let size = |side: usize| (side + 2 * border - 3) / stride + 1;
    let (rows, columns) = (size(height), size(width));
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    let mut pooled = vec![0.0; batch * rows * columns * channels];
    pooled.par_chunks_mut(columns * channels).enumerate().for_each(|(row, out)| {
        let (image, row) = (&values[row / rows * height * width * channels..], row % rows);
        let range = |at: usize, side: usize| (at * stride).saturating_sub(border)..(at * stride + 3 - border).min(side);
        let ys = range(row, height);
        for (column, out) in out.chunks_mut(channels).enumerate() {
            let xs = range(column, width);
            for (channel, out) in out.iter_mut().enumerate() {
                let at = |y: usize, x: usize| image[(y * width + x) * channels + channel];
                let pixels = ys.clone().flat_map(|y| xs.clone().map(move |x| (y, x)));
                let value = f(&mut pixels.map(|(y, x)| at(y, x)));
                *out = if mean { value / (ys.len() * xs.len()) as f32 } else { value };
            }
        }
    });
    Ok(Tensor::from_vec(pooled, (batch, rows, columns, channels), x.device())?)
}

/// Bilinear interpolation to 299 × 299 with `align_corners = False`.
fn resize(pixels: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = pixels.dims4()?;
    let values = pixels.flatten_all()?.to_vec1::<f32>()?;
    // The two input pixels around each output pixel, and the weight of the second.
    let places = |side: usize| -> Vec<(usize, usize, f32)> {
        let scale = side as f32 / SIDE as f32;
        let place = |i: usize| {
            let at = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
            let first = (at as usize).min(side - 1);
            (first, (first + 1).min(side - 1), at - first as f32)
        };
        (0..SIDE).map(place).collect()
    };
    let (ys, xs) = (places(height), places(width));
    let mut resized = vec![0.0; batch * SIDE * SIDE * channels];
    resized.par_chunks_mut(SIDE * channels).enumerate().for_each(|(row, out)| {
        let image = &values[row / SIDE * height * width * channels..];
        let (top, bottom, down) = ys[row % SIDE];
        for (out, &(left, right, along)) in out.chunks_mut(channels).zip(&xs) {
            for (channel, out) in out.iter_mut().enumerate() {
                let at = |y: usize, x: usize| image[(y * width + x) * channels + channel];
                let between = |y| at(y, left) * (1.0 - along) + at(y, right) * along;
                *out = between(top) * (1.0 - down) + between(bottom) * down;
            }
        }
    });
    Ok(Tensor::from_vec(resized, (batch, SIDE, SIDE, channels), pixels.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::params::Param;
    use crate::ops::testing::{hashed, values};
    use std::collections::HashMap;

    /// Against pytorch-fid (scripts/golden_inception.py).
    #[test]
    fn features_are_pytorch_fid_s() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../tests/golden/inception.safetensors"), "golden")?;
        let fresh = Scope::from_seed(0, DType::F32, &Device::Cpu);
        Inception::new(&fresh)?;
        let weight = |(name, var): (String, Param)| {
            let dims = var.dims();
            let tensor = match name.rsplit('.').next() {
                Some("running_var") => (hashed(&name, dims, 0.4).abs()? + 1.0)?,
                _ if name.ends_with("conv.weight") => {
                    hashed(&name, dims, (24.0 / dims[1..].iter().product::<usize>() as f64).sqrt())
                }
                _ if name.ends_with("bn.weight") => (hashed(&name, dims, 0.2) + 1.0)?,
                _ => hashed(&name, dims, 0.1),
            };
            Ok((name, tensor))
        };
        let weights = fresh.params().into_iter().map(weight).collect::<Result<HashMap<_, _>>>()?;
        let scope = Scope::from_tensors(weights, DType::F32, &Device::Cpu);
        let network = Inception::new(&scope)?;
        let pixels = ((golden["x"].permute((0, 2, 3, 1))?.contiguous()? * 2.0)? - 1.0)?;
        let (ours, theirs) = (values(&network.features(&pixels)?), values(&golden["features"]));
        assert_eq!(ours.len(), theirs.len());
        // The two images' features differ by 2e-3.
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() < 1e-5 + 1e-4 * b.abs(), "{a} instead of {b}");
        }
        Ok(())
    }
}
