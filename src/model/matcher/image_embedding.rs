//! The ViT's embedding: patches and a class token, with positions (arXiv 2010.11929; CLIP norms their sum).

use super::Input;
use crate::{
    config::{self, Precision},
    error::{Context, Result, bail, ensure},
    nn::{
        gradients::Gradients,
        norm::LayerNorm,
        params::{Init, Params, Scope},
        segment::{Autograd, Saved, Segment},
    },
    ops::{self, epilogue::Epilogue, linear, slices::view},
};
use candle_core::{Device, Tensor};

/// Mean and standard deviation of CLIP's training images in 0..1, for red, green and blue.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// The first segment of the image encoder.
pub struct ImageEmbedding {
    /// (hidden, patch · patch · 3), each patch in the order row, column, color.
    patch: Tensor,
    /// (hidden)
    class: Tensor,
    /// (1 + patches, hidden)
    position: Tensor,
    norm: LayerNorm,
    side: usize,
    patch_size: usize,
    /// Name of the encoder's scope.
    prefix: String,
    name: String,
    params: Params,
}

impl ImageEmbedding {
    pub fn new(scope: &Scope, config: &config::Matcher) -> Result<Self> {
        let (side, patch_size, hidden) = (config.image_size, config.patch_size, config.image_hidden);
        ensure!(patch_size > 0 && side % patch_size == 0, "{side} pixels are no whole number of patches");
        let std = (hidden as f64).powf(-0.5);
        let values = patch_size * patch_size * 3;
        Ok(Self {
            patch: scope.get("patch", (hidden, values), Init::Normal((values as f64).powf(-0.5)))?,
            class: scope.get("class", hidden, Init::Normal(std))?,
            position: scope.table("position", (1 + config.patches(), hidden), Init::Normal(std))?,
            norm: LayerNorm::new(&scope.at("norm_pre"), hidden)?,
            side,
            patch_size,
            prefix: scope.name().to_owned(),
            name: format!("{}.embedding", scope.name()),
            params: scope.params(),
        })
    }

    /// The pixels of a batch, and how many images they are.
    fn pixels<'b>(&self, input: &'b Input) -> Result<(&'b Tensor, usize)> {
        pixels(input, self.side)
    }

    /// Patches of pixels `(b, side, side, 3)` in [-1, 1], with CLIP's mean and deviation: `(b · patches, patch · patch · 3)`.
    fn patches(&self, pixels: &Tensor) -> Result<Vec<f32>> {
        let (side, patch) = (self.side, self.patch_size);
        let pixels = view::<f32>(pixels)?;
        let mut patches = Vec::with_capacity(pixels.len());
        for image in pixels.chunks_exact(side * side * 3) {
            for (top, left) in (0..side).step_by(patch).flat_map(|top| (0..side).step_by(patch).map(move |l| (top, l)))
            {
                for row in top..top + patch {
                    let row = &image[(row * side + left) * 3..][..patch * 3];
                    patches.extend(row.iter().enumerate().map(|(i, value)| normalized(*value, i % 3)));
                }
            }
        }
        Ok(patches)
    }
}

/// The pixels `(b, side, side, 3)` of a batch, and how many images they are.
pub(super) fn pixels(input: &Input, side: usize) -> Result<(&Tensor, usize)> {
    let Input::Images(pixels) = input else { bail!("texts for the image encoder") };
    let (b, height, width, colors) = pixels.dims4()?;
    ensure!([height, width, colors] == [side, side, 3], "images of {height} x {width}, expected {side} x {side}");
    Ok((pixels, b))
}

/// Pixels of any shape `(.., 3)` in [-1, 1] as CLIP's encoders read them.
pub(super) fn normalize(pixels: &Tensor, device: &Device) -> Result<Tensor> {
    let on_cpu = pixels.to_device(&Device::Cpu)?.contiguous()?;
    let values =
        view::<f32>(&on_cpu)?.iter().enumerate().map(|(i, value)| normalized(*value, i % 3)).collect::<Vec<_>>();
    Ok(Tensor::from_vec(values, pixels.shape(), device)?)
}

/// A value in [-1, 1] of a color, as CLIP's encoders read it.
fn normalized(value: f32, color: usize) -> f32 {
    ((value + 1.0) / 2.0 - MEAN[color]) / STD[color]
}

impl Autograd<Input> for ImageEmbedding {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// pixels (b, side, side, 3) → (b, 1 + patches, hidden).
    fn autograd(&self, _: &Tensor, input: &Input) -> Result<Tensor> {
        let (pixels, b) = self.pixels(input)?;
        let (positions, hidden) = self.position.dims2()?;
        let (device, dtype) = (self.patch.device(), self.patch.dtype());
        let on_cpu = pixels.to_device(&Device::Cpu)?.contiguous()?;
        let values = self.patch.dim(1)?;
        let patches = Tensor::from_vec(self.patches(&on_cpu)?, ((), values), device)?.to_dtype(dtype)?;
        let patches = ops::linear(&patches, &self.patch, None)?.reshape((b, positions - 1, hidden))?;
        let class = self.class.reshape((1, 1, hidden))?.broadcast_as((b, 1, hidden))?.contiguous()?;
        self.norm.forward(&Tensor::cat(&[class, patches], 1)?.broadcast_add(&self.position)?)
    }
}

/// [`ImageEmbedding`] with hand-written gradients, computed in `precision`.
pub struct ManualImageEmbedding<'a> {
    pub embedding: &'a ImageEmbedding,
    pub precision: Precision,
}

impl Segment<Input> for ManualImageEmbedding<'_> {
    fn name(&self) -> &str {
        &self.embedding.name
    }

    fn params(&self) -> &Params {
        &self.embedding.params
    }

    fn forward(&self, _: &Tensor, input: &Input) -> Result<(Tensor, Saved)> {
        let ImageEmbedding { patch, class, position, norm, .. } = self.embedding;
        let (pixels, b) = self.embedding.pixels(input)?;
        let (positions, hidden) = position.dims2()?;
        let patches = self.embedding.patches(pixels)?;
        let sizes = [b * (positions - 1), patch.dim(1)?, hidden];
        let embedded = linear::forward_in(self.precision, &patches, &view(patch)?, sizes, Epilogue::NONE);
        let (class, position) = (view::<f32>(class)?, view::<f32>(position)?);
        let mut sum = Vec::with_capacity(b * positions * hidden);
        for patches in embedded.chunks_exact((positions - 1) * hidden) {
            sum.extend(class.iter().chain(patches).zip(position.iter()).map(|(value, position)| value + position));
        }
        let y = norm.manual(&sum)?;
        Ok((Tensor::from_vec(y, (b, positions, hidden), pixels.device())?, Box::new(sum)))
    }

    fn backward(
        &self,
        _: &Tensor,
        input: &Input,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let ImageEmbedding { patch, class, position, norm, prefix, .. } = self.embedding;
        let sum = saved.downcast::<Vec<f32>>().ok().context("the saved state belongs to another segment")?;
        let (pixels, _) = self.embedding.pixels(input)?;
        let (positions, hidden) = position.dims2()?;
        let dy = dy.context("the embedding is not the last segment")?;
        let dsum = norm.manual_backward(&sum, &view(&dy)?, gradients)?;
        let dposition = linear::column_sums(&dsum, positions * hidden);
        gradients.accumulate_vector(&format!("{prefix}.class"), dposition[..class.elem_count()].to_vec())?;
        gradients
            .add(&format!("{prefix}.position"), Tensor::from_vec(dposition, position.shape(), position.device())?)?;
        let dpatches: Vec<f32> =
            dsum.chunks_exact(positions * hidden).flat_map(|sample| &sample[hidden..]).copied().collect();
        let patches = self.embedding.patches(pixels)?;
        let sizes = [dpatches.len() / hidden, patch.dim(1)?, hidden];
        gradients.accumulate(&format!("{prefix}.patch"), patch.shape(), |dw, beta| {
            linear::weight_gradient(self.precision, dw, beta, &dpatches, &patches, sizes);
        })?;
        Ok(None)
    }
}
