//! LPIPS (arXiv 1801.03924): perceptual distance of two images from VGG-16 features. It is the perceptual loss of
//! VQGAN's training (paper §2.1); parameter names are those of taming-transformers.

use crate::{
    config::Precision,
    error::{Hint, Result},
    nn::{
        params::{Init, Scope},
        weights,
    },
    ops::{self, Padding},
};
use candle_core::{D, DType, Device, Tensor};
use std::path::Path;

/// Name of the weights file in the folder of an imported network.
pub const FILE: &str = "lpips.safetensors";

/// VGG-16's convolutions, slice by slice: number in the reference, inputs, outputs. All slices but the first start with
/// max pooling.
const SLICES: [&[(usize, usize, usize)]; 5] = [
    &[(0, 3, 64), (2, 64, 64)],
    &[(5, 64, 128), (7, 128, 128)],
    &[(10, 128, 256), (12, 256, 256), (14, 256, 256)],
    &[(17, 256, 512), (19, 512, 512), (21, 512, 512)],
    &[(24, 512, 512), (26, 512, 512), (28, 512, 512)],
];
/// Mean and standard deviation of the color channels, for pixels in \[-1, 1\].
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];

/// The perceptual network. It is never trained.
pub struct Perceptual {
    precision: Precision,
    slices: Vec<Vec<(Tensor, Tensor)>>,
    /// Weight of each channel, one tensor `(channels)` per slice.
    heads: Vec<Tensor>,
}

impl Perceptual {
    /// Opens the network in a folder written by `vilg import lpips`; its matrix products use `precision`.
    ///
    /// # Errors
    /// The folder has no network, or the file is damaged.
    pub fn open(folder: &Path, precision: Precision, device: &Device) -> Result<Self> {
        let file = folder.join(FILE);
        let hint = "`vilg import lpips SRC DIR` writes such a folder";
        let bytes =
            weights::map(&file).hint(format!("there is no perceptual network in {}", folder.display()), hint)?;
        let tensors = weights::parse(&bytes, &file.display().to_string())?;
        let scope = Scope::from_tensors(tensors, DType::F32, device).in_precision(precision);
        let network = Self::new(&scope).and_then(|network| scope.finish().map(|()| network));
        network.hint(format!("{} is not an LPIPS network", file.display()), hint)
    }

    /// The network with the parameters of `scope`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(scope: &Scope) -> Result<Self> {
        let get = |scope: Scope, name: &str, shape: &[usize]| -> Result<Tensor> {
            // Detached, so that no gradients of the frozen weights are computed.
            Ok(scope.get(name, shape, Init::Zeros)?.detach())
        };
        let (mut slices, mut heads) = (Vec::new(), Vec::new());
        for (i, convolutions) in SLICES.iter().enumerate() {
            let net = scope.at("net").at(format_args!("slice{}", i + 1));
            let mut slice = Vec::new();
            for &(number, inputs, outputs) in *convolutions {
                let weight = get(net.at(number), "weight", &[outputs, inputs, 3, 3])?;
                slice.push((weight, get(net.at(number), "bias", &[outputs])?));
            }
            slices.push(slice);
            let channels = convolutions[0].2;
            let head = scope.at(format_args!("lin{i}")).at("model").at(1);
            heads.push(get(head, "weight", &[1, channels, 1, 1])?.flatten_all()?);
        }
        Ok(Self { precision: scope.precision(), slices, heads })
    }

    /// Pixels `(batch, height, width, 3)` in \[-1, 1\] → features of each slice, `(batch, h / 2ⁱ, w / 2ⁱ, channels)`.
    ///
    /// # Errors
    /// A side is shorter than 16 pixels.
    pub fn features(&self, pixels: &Tensor) -> Result<Vec<Tensor>> {
        let colour = |values: [f32; 3]| Tensor::new(&values, pixels.device());
        let mut x = pixels.broadcast_sub(&colour(SHIFT)?)?.broadcast_div(&colour(SCALE)?)?;
        let mut features = Vec::with_capacity(self.slices.len());
        for (i, slice) in self.slices.iter().enumerate() {
            if i > 0 {
                x = ops::max_pool2x(&x)?;
            }
            for (weight, bias) in slice {
                x = ops::conv2d_in(self.precision, &x, weight, Some(bias), 1, Padding::same(1))?.relu()?;
            }
            features.push(x.clone());
        }
        Ok(features)
    }

    /// Distances `(batch)` between the images of `a` and `b`.
    pub fn distance(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.between(&self.features(a)?, &self.features(b)?)
    }

    /// The same from the [`Perceptual::features`] of two images.
    pub fn between(&self, a: &[Tensor], b: &[Tensor]) -> Result<Tensor> {
        let mut sum = Tensor::zeros(a[0].dim(0)?, a[0].dtype(), a[0].device())?;
        for ((a, b), head) in a.iter().zip(b).zip(&self.heads) {
            let squares = (direction(a)? - direction(b)?)?.sqr()?;
            let (batch, height, width, channels) = squares.dims4()?;
            let by_channel = squares.reshape((batch, height * width, channels))?.mean(1)?;
            sum = (sum + by_channel.broadcast_mul(head)?.sum(D::Minus1)?)?;
        }
        Ok(sum)
    }
}

/// Features normalized to unit length at each position. The reference adds 1e-10 to the length; adding it under the
/// root keeps the gradient finite where all features are 0.
fn direction(x: &Tensor) -> Result<Tensor> {
    let length = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-20)?.sqrt()?;
    Ok(x.broadcast_div(&length)?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::nn::params::Param;
    use crate::ops::testing::{hashed, values};
    use candle_core::Var;
    use std::collections::{BTreeMap, HashMap};

    /// VGG-16 with the weights that the golden files were computed with.
    pub fn hashed_weights() -> Result<HashMap<String, Tensor>> {
        let scope = Scope::empty_from_seed(0, &Device::Cpu);
        Perceptual::new(&scope)?;
        let weight = |(name, var): (String, Param)| {
            let shape = var.dims();
            let tensor = match shape {
                _ if name.starts_with("lin") => hashed(&name, shape, 0.2).abs()?,
                [_, inputs, 3, 3] => hashed(&name, shape, (24.0 / (inputs * 9) as f64).sqrt()),
                _ => hashed(&name, shape, 0.1),
            };
            Ok((name, tensor))
        };
        scope.params().into_iter().map(weight).collect()
    }

    /// Writes that network to a folder.
    pub fn write_hashed(folder: &Path) -> Result<()> {
        let values = hashed_weights()?.into_iter().map(|(name, tensor)| Ok((name, weights::of_tensor(&tensor)?)));
        let values = values.collect::<Result<BTreeMap<_, _>>>()?;
        weights::write(&mut std::fs::File::create(folder.join(FILE))?, &values)
    }

    /// Compared with the `lpips` package (scripts/golden_lpips.py).
    #[test]
    fn equals_lpips() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../tests/golden/lpips.safetensors"), "lpips.safetensors")?;
        let nhwc = |name: &str| golden[name].permute((0, 2, 3, 1))?.contiguous();
        let network = Perceptual::new(&Scope::from_tensors(hashed_weights()?, DType::F32, &Device::Cpu))?;
        let (a, b) = (nhwc("a")?, Var::from_tensor(&nhwc("b")?)?);
        let features = network.features(&a)?;
        let distance = network.between(&features, &network.features(&b)?)?;
        let close = |what: &str, ours: &Tensor, theirs: &Tensor, tolerance: f64| {
            let (ours, theirs) = (values(ours), values(theirs));
            let scale = theirs.iter().map(|x| x.abs()).fold(0.0, f64::max);
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= tolerance * scale, "{what}: {a} instead of {b} (of {scale})");
            }
            assert_eq!(ours.len(), theirs.len());
        };
        close("distance", &distance, &golden["distance"], 1e-5);
        let deepest = &features[4];
        close("deepest", &deepest.reshape((2, (), 512))?.mean(1)?, &golden["deepest"], 1e-4);
        let store = distance.sum_all()?.backward()?;
        close("gradient", store.get(&b).unwrap(), &nhwc("gradient")?, 1e-4);
        assert!(values(&network.distance(&a, &a)?).iter().all(|x| *x == 0.0));
        Ok(())
    }

    /// Where all features are 0, the gradient of the root must stay finite.
    #[test]
    fn gradients_stay_finite_where_all_features_are_zero() -> Result<()> {
        let mut weights = hashed_weights()?;
        for (name, tensor) in &mut weights {
            if name.ends_with("bias") {
                *tensor = (tensor.ones_like()? * -100.0)?;
            }
        }
        let network = Perceptual::new(&Scope::from_tensors(weights, DType::F32, &Device::Cpu))?;
        let b = Var::from_tensor(&Tensor::zeros((1, 16, 16, 3), DType::F32, &Device::Cpu)?)?;
        let store = network.distance(&b.ones_like()?, &b)?.sum_all()?.backward()?;
        assert!(values(store.get(&b).unwrap()).iter().all(|x| x.is_finite()));
        Ok(())
    }

    #[test]
    fn missing_damaged_and_unknown_networks_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let open = || format!("{:#}", Perceptual::open(folder.path(), Precision::F32, &Device::Cpu).err().unwrap());
        assert!(open().contains("no perceptual network in"), "{}", open());
        write_hashed(folder.path())?;
        assert!(Perceptual::open(folder.path(), Precision::F32, &Device::Cpu).is_ok());
        let golden = include_bytes!("../../tests/golden/lpips.safetensors");
        std::fs::write(folder.path().join(FILE), golden)?;
        assert!(open().contains("not an LPIPS network"), "{}", open());
        Ok(())
    }
}
