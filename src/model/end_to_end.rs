//! End-to-end training of generator and reconstructor (paper §3.1.3): the hidden states at image positions become code
//! vectors by a small network, and the reconstructor makes pixels of them. No code is chosen on the way, so that the loss
//! of the pixels reaches every weight of the generator.

use super::{
    batch::Batch,
    head::{AutogradHead, Head},
    manual::{Found, ManualHead},
    sequence::Modality,
    straight_through::with_gradient_scale,
};
use crate::{
    config::{Activation, Config, HiddenState, ImageTokenizer, Precision},
    error::{Result, ensure},
    nn::{
        gradients::Gradients,
        linear::Linear,
        mlp_manual::ManualMlp,
        norm::LayerNorm,
        params::{Params, Scope},
        pattern::Grid,
        segment::{Autograd, Saved, Segment, unpack},
    },
    ops::{activation, slices::view},
    tokenizer::{Decoded, PixelBatch, Reconstructor},
};
use candle_core::{D, DType, Tensor};
use std::ops::Range;

/// What end-to-end training adds to a generator.
pub struct EndToEnd {
    hidden: HiddenState,
    map: Map,
    reconstructor: Reconstructor,
    grid: Grid,
    /// Of the map and the reconstructor.
    pub(super) params: Params,
}

/// The scope of the parameters.
pub const SCOPE: &str = "end_to_end";
/// The scope of the reconstructor's parameters, below which they have the names of an image tokenizer's.
pub const RECONSTRUCTOR: &str = "end_to_end.reconstructor";

/// Hidden states to code vectors: layer norm, linear, GELU, linear. The paper says no more than "non-linear".
struct Map {
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Map {
    fn new(scope: &Scope, [hidden, width, outputs]: [usize; 3]) -> Result<Self> {
        // The output then varies as much as its normalized input.
        let std = |inputs: usize| (inputs as f64).powf(-0.5);
        Ok(Self {
            norm: LayerNorm::new(&scope.at("norm"), hidden)?,
            fc1: Linear::new(&scope.at("fc1"), hidden, width, std(hidden))?,
            fc2: Linear::new(&scope.at("fc2"), width, outputs, std(width))?,
        })
    }

    /// (.., hidden) → (.., width), the input of the last layer.
    fn activated(&self, precision: Precision, x: &Tensor) -> Result<Tensor> {
        self.fc1.forward_activated(precision, Activation::Gelu, &self.norm.forward(x)?)
    }
}

/// Norm of the gradient of the map's last weight, for its input `activated` (.., width) and the gradient of the code
/// vectors (b, height, width, code_dim).
fn last_weight_norm(activated: &Tensor, dz: &Tensor) -> Result<f64> {
    let activated = activated.detach().reshape(((), activated.dim(D::Minus1)?))?;
    let dz = dz.reshape((activated.dim(0)?, ()))?.to_dtype(activated.dtype())?;
    let gradient = dz.t()?.matmul(&activated)?.to_dtype(DType::F64)?;
    Ok(gradient.sqr()?.sum_all()?.sqrt()?.to_scalar()?)
}

impl EndToEnd {
    /// Map and reconstructor of a trained model.
    pub fn new(scope: &Scope, config: &Config, grid: Grid) -> Result<Self> {
        Self::with(Reconstructor::new, scope, config, grid)
    }

    /// The same for training, with all losses of the reconstructor.
    pub fn in_training(scope: &Scope, config: &Config, grid: Grid) -> Result<Self> {
        Self::with(Reconstructor::in_training, scope, config, grid)
    }

    fn with(
        reconstructor: fn(&Scope, &ImageTokenizer) -> Result<Reconstructor>,
        scope: &Scope,
        config: &Config,
        grid: Grid,
    ) -> Result<Self> {
        let (scope, settings, tokenizer) = (scope.at(SCOPE), &config.end_to_end, &config.image_tokenizer);
        let hidden = config.model.hidden;
        let width = if settings.map_width == 0 { hidden } else { settings.map_width };
        let map = Map::new(&scope.at("map"), [hidden, width, tokenizer.code_dim])?;
        let reconstructor = reconstructor(&scope.at("reconstructor"), tokenizer)?;
        Ok(Self { hidden: settings.hidden, map, reconstructor, grid, params: scope.params() })
    }

    /// Whether it has hand-written gradients.
    pub(super) fn is_manual(&self) -> bool {
        self.reconstructor.is_manual()
    }

    /// A text → image batch with the positions that the reconstruction reads.
    pub fn arrange(&self, batch: Batch) -> Batch {
        match self.hidden {
            HiddenState::Input => batch.reading_last(),
            HiddenState::Predict => batch,
        }
    }

    /// The positions whose hidden states belong to codes z₁ … zₙ.
    fn positions(&self, batch: &Batch) -> Result<Range<usize>> {
        let (span, source) = (batch.target().0, batch.source_positions());
        ensure!(span.modality == Modality::Image, "a sequence whose target is a text has no image to reconstruct");
        let first = match self.hidden {
            HiddenState::Input => source + 1,
            HiddenState::Predict => source,
        };
        ensure!(first + span.length <= source + span.positions(), "the last code of a sequence is not an input");
        Ok(first..first + span.length)
    }

    /// Hidden states (b, positions, hidden) → code vectors (b, height, width, code_dim).
    pub(super) fn code_vectors(&self, precision: Precision, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        Ok(self.activated_and_code_vectors(precision, x, batch)?.1)
    }

    /// The same with the input of the map's last layer (b, codes, width).
    fn activated_and_code_vectors(&self, precision: Precision, x: &Tensor, batch: &Batch) -> Result<(Tensor, Tensor)> {
        let positions = self.positions(batch)?;
        let states = x.narrow(1, positions.start, positions.len())?.contiguous()?;
        let Grid { height, width } = self.grid;
        let activated = self.map.activated(precision, &states)?;
        let z_emb = self.map.fc2.forward_in(precision, &activated)?.reshape((x.dim(0)?, height, width, ()))?;
        Ok((activated, z_emb))
    }

    /// Hidden states (b, positions, hidden) → pixels (b, side, side, 3), about in \[-1, 1\].
    ///
    /// # Errors
    /// The target of the batch is no image, or the pixels are not finite (damaged weights).
    pub fn pixels(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.reconstructor.decode(&self.code_vectors(Precision::F32, x, batch)?)
    }

    /// The loss of the reconstruction from hidden states `x` (b, positions, hidden), and what its backward pass needs.
    fn manual(&self, precision: Precision, x: &Tensor, batch: &Batch, pixels: &PixelBatch) -> Result<(f64, Mapped)> {
        let ((b, positions, hidden), read) = (x.dims3()?, self.positions(batch)?);
        let Map { norm, fc1, fc2 } = &self.map;
        let values = view::<f32>(x)?;
        let samples = values.chunks_exact(positions * hidden);
        let states: Vec<f32> =
            samples.flat_map(|sample| &sample[read.start * hidden..read.end * hidden]).copied().collect();
        let normed = norm.manual(&states)?;
        let mlp = ManualMlp::new([fc1, fc2], Activation::Gelu, precision);
        let (z_emb, inner) = mlp.forward(&normed, None)?;
        let z_emb = Tensor::from_vec(z_emb, (b, self.grid.height, self.grid.width, fc2.outputs()), x.device())?;
        let map_norm = |dz: &Tensor| {
            let activated = activation::forward(Activation::Gelu, &inner);
            last_weight_norm(&Tensor::from_vec(activated, (b * read.len(), fc1.outputs()), x.device())?, dz)
        };
        let (loss, decoded) = self.reconstructor.manual_loss(&z_emb, pixels, map_norm)?;
        Ok((loss, Mapped { states, normed, inner, decoded }))
    }

    /// Adds the gradients of [`EndToEnd::manual`]: those of the parameters to `gradients`, those of hidden states of the
    /// shape of `x` to `dx`.
    fn manual_backward(
        &self,
        precision: Precision,
        (x, dx): (&Tensor, &mut [f32]),
        (batch, pixels): (&Batch, &PixelBatch),
        mapped: Mapped,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Mapped { states, normed, inner, decoded } = mapped;
        let ((_, positions, hidden), read) = (x.dims3()?, self.positions(batch)?);
        let Map { norm, fc1, fc2 } = &self.map;
        let dz = self.reconstructor.manual_backward(decoded, pixels, gradients)?;
        let mlp = ManualMlp::new([fc1, fc2], Activation::Gelu, precision);
        let dnormed = mlp.backward(|| Ok(normed), inner, &view(&dz)?, gradients)?;
        let dstates = norm.manual_backward(&states, &dnormed, gradients)?;
        let scale = batch.generator_gradient as f32;
        let rows = dx.chunks_exact_mut(positions * hidden);
        for (dx, dstates) in rows.zip(dstates.chunks_exact(read.len() * hidden)) {
            dx[read.start * hidden..read.end * hidden].iter_mut().zip(dstates).for_each(|(dx, d)| *dx += scale * d);
        }
        Ok(())
    }
}

/// What the reconstruction keeps for its backward pass.
struct Mapped {
    /// Hidden states of the codes, (b · codes, hidden).
    states: Vec<f32>,
    normed: Vec<f32>,
    inner: Vec<f32>,
    decoded: Decoded,
}

/// The last segment of the chain: the head with the loss of the tokens and, for batches with pixels, the reconstruction
/// with the loss of the pixels; the two are added.
pub(super) struct EndToEndHead<'a> {
    pub head: &'a Head,
    pub end_to_end: &'a EndToEnd,
    pub precision: Precision,
    /// Of both.
    params: Params,
}

impl<'a> EndToEndHead<'a> {
    pub fn new(head: &'a Head, end_to_end: &'a EndToEnd, precision: Precision) -> Self {
        let params = [&head.params, &end_to_end.params].into_iter().flatten();
        let params = params.map(|(name, param)| (name.clone(), param.clone())).collect();
        Self { head, end_to_end, precision, params }
    }
}

impl Autograd<Batch> for EndToEndHead<'_> {
    fn name(&self) -> &str {
        "head and reconstructor"
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// (b, positions, hidden) → the loss, a scalar.
    fn autograd(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let of_tokens = AutogradHead { head: self.head, precision: self.precision }.loss(x, batch)?;
        let Some(pixels) = &batch.pixels else { return Ok(of_tokens) };
        // The reconstruction does not follow the transformer into half precision.
        let x = x.to_dtype(self.end_to_end.map.norm.weight().dtype())?;
        let x = with_gradient_scale(&x, batch.generator_gradient)?;
        let (activated, z_emb) = self.end_to_end.activated_and_code_vectors(self.precision, &x, batch)?;
        let map_norm = |dz: &Tensor| last_weight_norm(&activated, dz);
        Ok((of_tokens + self.end_to_end.reconstructor.loss(&z_emb, pixels, map_norm)?)?)
    }
}

/// [`EndToEndHead`] with hand-written gradients.
pub(super) struct ManualEndToEndHead<'a>(pub EndToEndHead<'a>);

impl Segment<Batch> for ManualEndToEndHead<'_> {
    fn name(&self) -> &str {
        Autograd::name(&self.0)
    }

    fn params(&self) -> &Params {
        &self.0.params
    }

    /// (b, positions, hidden) → the loss, a scalar.
    fn forward(&self, x: &Tensor, batch: &Batch) -> Result<(Tensor, Saved)> {
        let EndToEndHead { head, end_to_end, precision, .. } = &self.0;
        let mut found = ManualHead { head, precision: *precision }.find(x, batch)?;
        let pixels = batch.pixels.as_ref();
        let reconstruction = pixels.map(|pixels| end_to_end.manual(*precision, x, batch, pixels)).transpose()?;
        found.loss += reconstruction.as_ref().map_or(0.0, |(loss, _)| *loss);
        let loss = Tensor::new(found.loss as f32, x.device())?;
        Ok((loss, Box::new((found, reconstruction.map(|(_, mapped)| mapped)))))
    }

    fn backward(
        &self,
        x: &Tensor,
        batch: &Batch,
        saved: Saved,
        _: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let EndToEndHead { end_to_end, precision, .. } = &self.0;
        let (mut found, mapped) = unpack::<(Found, Option<Mapped>)>(saved)?;
        if let (Some(pixels), Some(mapped)) = (&batch.pixels, mapped) {
            end_to_end.manual_backward(*precision, (x, &mut found.dx), (batch, pixels), mapped, gradients)?;
        }
        found.backward(x, gradients)
    }
}
