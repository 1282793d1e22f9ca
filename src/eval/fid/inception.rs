//! InceptionV3, whose features define the FID (arXiv 1706.08500), with the weights of TensorFlow's network or of torchvision's.
//! Tensor names are torchvision's in both. The networks differ in their pooling: TensorFlow's averages exclude padding, and its
//! last block uses max pooling.

use super::architecture::{
    Piece::{self, Average, Down, Fork, Largest, Square, Strip},
    Weights, mixed,
};
use crate::{
    error::{Hint, Result, ensure, failed},
    nn::{
        params::{Init, Scope},
        weights,
    },
    ops::{self, Padding},
};
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;
use std::{collections::HashMap, path::Path};

/// Name of the weights file in the folder of an imported network.
pub const INCEPTION_FILE: &str = "inception.safetensors";

/// Side length of the network's images in pixels.
pub const SIDE: usize = 299;
/// Number of features of an image.
const FEATURES: usize = 2048;
/// Number of classes of ImageNet; TensorFlow's network has 1008.
const IMAGENET_CLASSES: usize = 1000;
const NORM_EPS: f64 = 1e-3;

enum Step {
    Conv(Conv),
    Fork([Conv; 2]),
    /// Whether padding counts.
    Average(bool),
    Largest(usize),
}

/// A convolution with batch norm folded in, followed by ReLU.
struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: Padding,
}

/// The network up to its pooled features, and its classifier.
pub struct Inception {
    /// Blocks of parallel branches whose outputs are concatenated.
    blocks: Vec<Vec<Vec<Step>>>,
    /// `(classes, 2048)`; folders of earlier versions lack it.
    classifier: Option<Tensor>,
    weights: Weights,
}

impl Inception {
    /// Opens the network in a folder written by `vilg import inception`.
    ///
    /// # Errors
    /// The folder has no network or one with other weights than `wanted`, or the file is damaged.
    pub fn open(folder: &Path, wanted: Weights, device: &Device) -> Result<Self> {
        let file = folder.join(INCEPTION_FILE);
        let hint = "`vilg import inception SRC DIR` writes such a folder";
        let bytes = weights::map(&file).hint(format!("there is no Inception network in {}", folder.display()), hint)?;
        let tensors = weights::parse(&bytes, &file.display().to_string())?;
        let found = Self::from_tensors(tensors, device).hint(format!("{} is damaged", file.display()), hint)?;
        let message = format!("{} is {}, not {wanted}", folder.display(), found.weights);
        ensure!(found.weights == wanted, failed(message, "import the other weights, or choose another --protocol"));
        Ok(found)
    }

    /// The network with these tensors and no others. The number of classes tells whose weights they are.
    ///
    /// # Errors
    /// A tensor is missing, unknown or misshapen.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, device: &Device) -> Result<Self> {
        let classes = tensors.get("fc.weight").map(|weight| weight.dim(0)).transpose()?;
        let weights = if classes == Some(IMAGENET_CLASSES) { Weights::Torchvision } else { Weights::TensorFlow };
        let scope = Scope::from_tensors(tensors, DType::F32, device);
        let network = Self::new(&scope, weights, classes)?;
        scope.finish()?;
        Ok(network)
    }

    /// The network with the parameters of `scope`.
    fn new(scope: &Scope, weights: Weights, classes: Option<usize>) -> Result<Self> {
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
        for (name, branches) in mixed(weights) {
            let scope = scope.at(format_args!("Mixed_{name}"));
            let (mut built, mut outputs) = (Vec::new(), 0);
            for branch in branches {
                let (steps, out) = build(&scope, channels, &branch, weights)?;
                built.push(steps);
                outputs += out;
            }
            blocks.push(built);
            channels = outputs;
        }
        let classifier = classes.map(|classes| scope.at("fc").get("weight", (classes, FEATURES), Init::Zeros));
        Ok(Self { blocks, classifier: classifier.transpose()?.map(|weight| weight.detach()), weights })
    }

    /// Pixels `(batch, height, width, 3)` in \[-1, 1\] → features `(batch, 2048)`, after pytorch-fid's resizing.
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor> {
        self.forward(&resize(pixels)?)
    }

    /// Pixels `(batch, 299, 299, 3)` → features `(batch, 2048)`.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = pixels.clone();
        for branches in &self.blocks {
            let outputs = branches.iter().map(|steps| steps.iter().try_fold(x.clone(), |x, step| step.forward(&x)));
            x = Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, D::Minus1)?;
        }
        Ok(x.flatten(1, 2)?.mean(1)?)
    }

    /// Features `(batch, 2048)` → logits `(batch, classes)` without bias, as the Inception Score takes them.
    ///
    /// # Errors
    /// The folder has no classifier.
    pub fn logits(&self, features: &Tensor) -> Result<Tensor> {
        let hint = "import the network again: folders of earlier versions lack the classifier";
        let classifier = self.classifier.as_ref().hint("the Inception network has no classifier", hint)?;
        Ok(features.matmul(&classifier.t()?)?)
    }
}

/// Builds a branch; returns its steps and its number of output channels.
fn build(scope: &Scope, mut channels: usize, branch: &[Piece], weights: Weights) -> Result<(Vec<Step>, usize)> {
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
            Average => (Step::Average(weights == Weights::Torchvision), channels),
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
            Self::Average(true) => pool(x, 1, |values, _| values.sum::<f32>() / 9.0),
            Self::Average(false) => pool(x, 1, |values, count| values.sum::<f32>() / count as f32),
            Self::Largest(stride) => pool(x, *stride, |values, _| values.fold(f32::MIN, f32::max)),
        }
    }
}

/// 3 × 3 pooling of each channel: with stride 1 around every pixel, else only at full windows. `f` reduces the values of a
/// window inside the image, given their number.
fn pool(x: &Tensor, stride: usize, f: impl Fn(&mut dyn Iterator<Item = f32>, usize) -> f32 + Sync) -> Result<Tensor> {
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
                *out = f(&mut pixels.map(|(y, x)| at(y, x)), ys.len() * xs.len());
            }
        }
    });
    Ok(Tensor::from_vec(pooled, (batch, rows, columns, channels), x.device())?)
}

/// Bilinear interpolation of `(batch, height, width, 3)` to 299 × 299 with `align_corners = False`, without antialiasing.
pub fn resize(pixels: &Tensor) -> Result<Tensor> {
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

    /// The network with weights by the formula of scripts/golden_weights.py.
    fn network(weights: Weights, classes: usize) -> Result<Inception> {
        let fresh = Scope::from_seed(0, DType::F32, &Device::Cpu);
        Inception::new(&fresh, weights, Some(classes))?;
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
        let tensors = fresh.params().into_iter().map(weight).collect::<Result<HashMap<_, _>>>()?;
        Inception::from_tensors(tensors, &Device::Cpu)
    }

    /// Two images, and pytorch-fid's features of them (scripts/golden_inception.py).
    fn golden() -> Result<(Tensor, Vec<f64>)> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/inception.safetensors"), "golden")?;
        let pixels = ((golden["x"].permute((0, 2, 3, 1))?.contiguous()? * 2.0)? - 1.0)?;
        Ok((pixels, values(&golden["features"])))
    }

    fn close(ours: &[f64], theirs: &[f64]) {
        assert_eq!(ours.len(), theirs.len());
        // The two images' features differ by 2e-3 and 4e-4.
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() < 1e-5 + 1e-4 * b.abs(), "{a} instead of {b}");
        }
    }

    #[test]
    fn features_are_pytorch_fid_s() -> Result<()> {
        let (pixels, theirs) = golden()?;
        let network = network(Weights::TensorFlow, 1008)?;
        assert_eq!(network.weights, Weights::TensorFlow);
        let features = network.features(&pixels)?;
        close(&values(&features), &theirs);
        assert_eq!(network.logits(&features)?.dims(), [2, 1008]);
        Ok(())
    }

    /// Against torchvision (scripts/golden_fid.py), whose normalisation is that of the protocol `dm-gan`.
    #[test]
    fn features_are_torchvision_s() -> Result<()> {
        let golden_fid = weights::parse(include_bytes!("../../../tests/golden/fid.safetensors"), "golden")?;
        let network = network(Weights::Torchvision, IMAGENET_CLASSES)?;
        assert_eq!(network.weights, Weights::Torchvision);
        let unit = resize(&((golden()?.0 + 1.0)? / 2.0)?)?;
        let [scale, shift] =
            super::super::protocol::IMAGENET.map(|row| Tensor::new(&row.map(|x| x as f32), &Device::Cpu));
        let pixels = unit.broadcast_mul(&scale?)?.broadcast_add(&shift?)?;
        close(&values(&network.forward(&pixels)?), &values(&golden_fid["imagenet.features"]));
        let corner = pixels.narrow(1, 0, 1)?.narrow(2, 0, 1)?;
        close(&values(&corner), &values(&golden_fid["imagenet.transformed"]));
        Ok(())
    }
}
