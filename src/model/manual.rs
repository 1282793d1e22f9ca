//! The generator's segments with hand-written gradients, for the CPU in f32. A test holds them equal to the autograd
//! segments.

use super::{
    batch::Batch,
    embedding::Embedding,
    head::Head,
    layer::Layer,
    sequence::{Layout, Slot},
};
use crate::{
    config::Precision,
    error::{Context, Result, ensure},
    nn::{
        block_manual::Activations,
        gradients::Gradients,
        params::Params,
        segment::{Saved, Segment, unpack},
    },
    ops::{attention::Sizes, cross_entropy, scatter::scatter_add, slices::view},
};
use candle_core::Tensor;

/// [`Embedding`] with hand-written gradients.
pub struct ManualEmbedding<'g>(pub &'g Embedding);

/// (row of an embedding table, position of the batch that it is added to)
type Lookup = (usize, usize);

/// The rows of the embedding tables that a batch looks up.
#[derive(Default)]
struct Lookups {
    text: Vec<Lookup>,
    text_position: Vec<Lookup>,
    image_start: Vec<Lookup>,
    image: Vec<Lookup>,
    image_row: Vec<Lookup>,
    image_column: Vec<Lookup>,
}

impl Lookups {
    fn of(batch: &Batch, layout: &Layout) -> Result<Self> {
        let mut lookups = Self::default();
        for ((start, span), (_, tokens)) in layout.spans().zip(batch.parts()) {
            for (sample, ids) in tokens.ids.to_vec2::<u32>()?.iter().enumerate() {
                let first = sample * layout.positions() + start;
                (0..span.positions()).for_each(|i| lookups.push(span.slot(i), ids, first + i, layout.grid().width));
            }
        }
        Ok(lookups)
    }

    /// Adds the lookups of `position`, which belongs to a span with these token ids.
    fn push(&mut self, slot: Slot, ids: &[u32], position: usize, width: usize) {
        match slot {
            Slot::Text(i) => {
                self.text.push((ids[i] as usize, position));
                self.text_position.push((i, position));
            }
            Slot::Start => self.image_start.push((0, position)),
            Slot::Image(place) => {
                self.image.push((ids[place] as usize, position));
                self.image_row.push((place / width, position));
                self.image_column.push((place % width, position));
            }
        }
    }

    /// The lookups with their table and its name in the checkpoint.
    fn tables<'a>(&'a self, embedding: &'a Embedding) -> [(&'static str, &'a Tensor, &'a [Lookup]); 6] {
        [
            ("text_embedding.weight", &embedding.text, &self.text),
            ("text_position.weight", &embedding.text_position, &self.text_position),
            ("image_start", &embedding.image_start, &self.image_start),
            ("image_embedding.weight", &embedding.image, &self.image),
            ("image_row.weight", &embedding.image_row, &self.image_row),
            ("image_column.weight", &embedding.image_column, &self.image_column),
        ]
    }
}

impl Segment<Batch> for ManualEmbedding<'_> {
    fn name(&self) -> &str {
        "embedding"
    }

    fn params(&self) -> &Params {
        &self.0.params
    }

    /// Token ids of `batch` → (b, positions, hidden).
    fn forward(&self, _: &Tensor, batch: &Batch) -> Result<(Tensor, Saved)> {
        self.0.check(batch)?;
        let layout = batch.layout(self.0.grid)?;
        let lookups = Lookups::of(batch, &layout)?;
        let (b, l, hidden) = (batch.samples(), layout.positions(), self.0.image_start.elem_count());
        let mut x = vec![0f32; b * l * hidden];
        for (name, table, lookups) in lookups.tables(self.0) {
            let rows = table.elem_count() / hidden;
            ensure!(lookups.iter().all(|&(row, _)| row < rows), "a token is outside of the {rows} rows of {name}");
            let table = view::<f32>(table)?;
            for &(row, position) in lookups {
                let x = &mut x[position * hidden..][..hidden];
                x.iter_mut().zip(&table[row * hidden..][..hidden]).for_each(|(x, t)| *x += t);
            }
        }
        Ok((Tensor::from_vec(x, (b, l, hidden), batch.device())?, Box::new(lookups)))
    }

    fn backward(
        &self,
        _: &Tensor,
        batch: &Batch,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (lookups, dy) = (unpack::<Lookups>(saved)?, dy.context("the embedding is not the last segment")?);
        let (hidden, values) = (dy.dim(2)?, view::<f32>(&dy)?);
        for (name, table, lookups) in lookups.tables(self.0).into_iter().filter(|(_, _, lookups)| !lookups.is_empty()) {
            gradients.accumulate(name, table.shape(), |sum, onto| scatter_add(sum, onto, hidden, &values, lookups))?;
        }
        batch.source_pixels.as_ref().map(|_| self.soft_codes_gradient(batch, &dy)).transpose()
    }
}

impl ManualEmbedding<'_> {
    /// The gradient of the source image's soft codes (b, n, codes) from that of all positions (b, positions, hidden), as
    /// [`straight_through`](super::straight_through::straight_through) has it.
    fn soft_codes_gradient(&self, batch: &Batch, dy: &Tensor) -> Result<Tensor> {
        let layout = batch.layout(self.0.grid)?;
        let image = layout.spans().find(|(_, span)| span.is_source_image());
        let (start, span) = image.context("a sequence without a source image")?;
        let dy = dy.narrow(1, start, span.positions())?.contiguous()?;
        let (b, n, hidden) = dy.dims3()?;
        let soft = dy.reshape((b * n, hidden))?.matmul(&self.0.image.detach().t()?)?.reshape((b, n, ()))?;
        Ok((soft * batch.tokenizer_gradient)?)
    }
}

/// [`Layer`] with hand-written gradients.
pub struct ManualLayer<'g> {
    pub layer: &'g Layer,
    pub precision: Precision,
}

impl ManualLayer<'_> {
    fn sizes(&self, x: &Tensor) -> Result<Sizes> {
        let (samples, positions, hidden) = x.dims3()?;
        let heads = self.layer.block.heads();
        Ok(Sizes { samples, positions, heads, d: hidden / heads })
    }
}

impl Segment<Batch> for ManualLayer<'_> {
    fn name(&self) -> &str {
        &self.layer.name
    }

    fn params(&self) -> &Params {
        &self.layer.params
    }

    /// (b, positions, hidden) → (b, positions, hidden).
    fn forward(&self, x: &Tensor, batch: &Batch) -> Result<(Tensor, Saved)> {
        let (keys, sizes) = (self.layer.keys(batch)?, self.sizes(x)?);
        keys.check(sizes.samples, sizes.positions)?;
        let (y, saved) = self.layer.block.manual(self.precision, &view(x)?, &keys, sizes)?;
        Ok((Tensor::from_vec(y, x.shape(), x.device())?, Box::new(saved)))
    }

    fn backward(
        &self,
        x: &Tensor,
        batch: &Batch,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (saved, dy) = (unpack::<Activations>(saved)?, dy.context("a block is not the last segment")?);
        let (keys, sizes) = (self.layer.keys(batch)?, self.sizes(x)?);
        let block = &self.layer.block;
        let dx = block.manual_backward(self.precision, &view(x)?, (&keys, sizes), saved, &view(&dy)?, gradients)?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// [`Head`] with hand-written gradients. It is the last segment, so the gradient of the loss is known as soon as the
/// logits are: the forward pass also computes the gradients, a few rows at a time. The logits of a whole batch never
/// exist in memory at once (as in fused linear cross-entropy).
pub struct ManualHead<'g> {
    pub head: &'g Head,
    pub precision: Precision,
}

/// Number of rows whose logits are in memory at once.
pub(super) const ROWS: usize = 512;

/// The loss and its gradients, computed in the forward pass.
pub(super) struct Found {
    pub loss: f64,
    pub gradients: Gradients,
    /// (b, positions, hidden)
    pub dx: Vec<f32>,
}

/// The rows of a batch that count in the loss: their index in (b, positions), target tokens and weights.
struct Predicted {
    rows: Vec<usize>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Predicted {
    /// For `b` samples of `positions` positions; the targets are the first ones after the sources.
    fn of(batch: &Batch, b: usize, positions: usize) -> Result<Self> {
        let (targets, weights) = batch.outputs()?;
        let (targets, weights) = (targets.to_vec1::<u32>()?, weights.to_vec1::<f32>()?);
        let (each, first) = (targets.len() / b.max(1), batch.source_positions());
        let fits = first + each <= positions && each * b == targets.len();
        ensure!(fits, "{positions} positions for {first} of sources and {each} targets a sample");
        let mut predicted = Self { rows: Vec::new(), targets: Vec::new(), weights: Vec::new() };
        for (i, (target, weight)) in targets.into_iter().zip(weights).enumerate().filter(|(_, (_, w))| *w != 0.0) {
            predicted.rows.push((i / each) * positions + first + i % each);
            predicted.targets.push(target);
            predicted.weights.push(weight);
        }
        Ok(predicted)
    }
}

impl ManualHead<'_> {
    /// The loss of hidden states (b, positions, hidden).
    pub(super) fn find(&self, x: &Tensor, batch: &Batch) -> Result<Found> {
        let (b, positions, hidden) = x.dims3()?;
        let predicted = Predicted::of(batch, b, positions)?;
        let linear = self.head.linear(batch.target().0.modality);
        let vocabulary = linear.outputs();
        let foreign = predicted.targets.iter().find(|&&target| target as usize >= vocabulary);
        ensure!(foreign.is_none(), "target {foreign:?} is outside the vocabulary of {vocabulary}");

        let values = view::<f32>(x)?;
        let mut found = Found { loss: 0.0, gradients: Gradients::default(), dx: vec![0.0; values.len()] };
        for part in 0..predicted.rows.len().div_ceil(ROWS) {
            let range = part * ROWS..predicted.rows.len().min((part + 1) * ROWS);
            let rows = &predicted.rows[range.clone()];
            let x: Vec<f32> = rows.iter().flat_map(|&row| &values[row * hidden..][..hidden]).copied().collect();
            let normed = self.head.norm.manual(&x)?;
            let mut logits = linear.manual(self.precision, &normed, None)?;
            let (targets, weights) = (&predicted.targets[range.clone()], &predicted.weights[range]);
            found.loss += cross_entropy::loss_and_gradient(&mut logits, vocabulary, targets, weights);
            let dnormed = linear.manual_backward(self.precision, &normed, &logits, &mut found.gradients)?;
            let dx = self.head.norm.manual_backward(&x, &dnormed, &mut found.gradients)?;
            for (&row, dx) in rows.iter().zip(dx.chunks_exact(hidden)) {
                found.dx[row * hidden..][..hidden].copy_from_slice(dx);
            }
        }
        Ok(found)
    }
}

impl Found {
    /// What the last segment of the chain returns for hidden states like `x`.
    fn output(self, x: &Tensor) -> Result<(Tensor, Saved)> {
        Ok((Tensor::new(self.loss as f32, x.device())?, Box::new(self)))
    }

    /// The backward pass of the last segment, whose gradients are there already.
    pub(super) fn backward(self, x: &Tensor, gradients: &mut Gradients) -> Result<Option<Tensor>> {
        gradients.merge(self.gradients)?;
        Ok(Some(Tensor::from_vec(self.dx, x.shape(), x.device())?))
    }
}

impl Segment<Batch> for ManualHead<'_> {
    fn name(&self) -> &str {
        "head"
    }

    fn params(&self) -> &Params {
        &self.head.params
    }

    /// (b, positions, hidden) → the loss, a scalar.
    fn forward(&self, x: &Tensor, batch: &Batch) -> Result<(Tensor, Saved)> {
        self.find(x, batch)?.output(x)
    }

    fn backward(
        &self,
        x: &Tensor,
        _: &Batch,
        saved: Saved,
        _: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        unpack::<Found>(saved)?.backward(x, gradients)
    }
}
