//! Token embeddings: one table per modality, position embeddings for text, row plus column embeddings for images.

use super::{
    batch::Batch,
    sequence::{Modality, Role, Span},
    straight_through::{straight_through, with_gradient_scale},
};
use crate::{
    config::Config,
    error::{Result, ensure},
    nn::{
        params::{Init, Params, Scope},
        pattern::Grid,
        segment::Autograd,
    },
    ops,
};
use candle_core::{Device, Tensor};

/// The embedding segment, first in the chain.
pub struct Embedding {
    pub(super) text: Tensor,
    pub(super) text_position: Tensor,
    pub(super) image: Tensor,
    pub(super) image_row: Tensor,
    pub(super) image_column: Tensor,
    pub(super) image_start: Tensor,
    pub(super) grid: Grid,
    pub(super) params: Params,
}

impl Embedding {
    pub fn new(scope: &Scope, config: &Config, vocab_size: usize, codebook_size: usize, grid: Grid) -> Result<Self> {
        let hidden = config.model.hidden;
        let table = |name: &str, rows: usize| scope.at(name).table("weight", (rows, hidden), Init::Normal(0.02));
        Ok(Self {
            text: table("text_embedding", vocab_size)?,
            text_position: table("text_position", config.text.max_tokens)?,
            image: table("image_embedding", codebook_size)?,
            image_row: table("image_row", grid.height)?,
            image_column: table("image_column", grid.width)?,
            image_start: scope.get("image_start", hidden, Init::Normal(0.02))?,
            grid,
            params: scope.params(),
        })
    }

    /// Checks that a batch's images fill the grid and its texts fit the position table.
    pub(super) fn check(&self, batch: &Batch) -> Result<()> {
        let (cells, most) = (self.grid.len(), self.text_position.dim(0)?);
        for (Span { modality, length, .. }, _) in batch.parts() {
            match modality {
                Modality::Text => ensure!(*length <= most, "a text of {length} tokens, with positions for {most}"),
                Modality::Image => ensure!(*length == cells, "an image of {length} codes, for a grid of {cells}"),
            }
        }
        Ok(())
    }

    pub(super) fn device(&self) -> &Device {
        self.text.device()
    }

    /// Embeds text: `ids` (b, l) at positions `first..first + l` → (b, l, hidden).
    pub fn text(&self, ids: &Tensor, first: usize) -> Result<Tensor> {
        let length = ids.dim(1)?;
        Ok(ops::embedding(&self.text, ids)?.broadcast_add(&self.text_position.narrow(0, first, length)?)?)
    }

    /// Embeds image codes: `codes` (b, l) at grid positions `first..first + l` → (b, l, hidden).
    pub fn image(&self, codes: &Tensor, first: usize) -> Result<Tensor> {
        let places = first as u32..(first + codes.dim(1)?) as u32;
        let width = self.grid.width as u32;
        let rows: Vec<u32> = places.clone().map(|place| place / width).collect();
        let columns: Vec<u32> = places.map(|place| place % width).collect();
        let select = |table: &Tensor, rows: Vec<u32>| table.index_select(&Tensor::new(rows, codes.device())?, 0);
        let position = (select(&self.image_row, rows)? + select(&self.image_column, columns)?)?;
        Ok(ops::embedding(&self.image, codes)?.broadcast_add(&position)?)
    }

    /// Embeds a span with token ids (b, length): appends tensors (b, ·, hidden) to `parts` that, concatenated, are the
    /// span's positions.
    pub fn push_span(&self, span: Span, ids: &Tensor, parts: &mut Vec<Tensor>) -> Result<()> {
        match (span.modality, span.role) {
            (Modality::Text, _) => parts.push(self.text(&ids.narrow(1, 0, span.positions())?, 0)?),
            (Modality::Image, Role::Source) => parts.push(self.image(ids, 0)?),
            (Modality::Image, Role::Target) => {
                parts.push(self.start(ids.dim(0)?)?);
                let codes = span.positions() - 1;
                if codes > 0 {
                    parts.push(self.image(&ids.narrow(1, 0, codes)?, 0)?);
                }
            }
        }
        Ok(())
    }

    /// The learned start of `b` images (b, 1, hidden).
    pub fn start(&self, b: usize) -> Result<Tensor> {
        let hidden = self.image_start.dim(0)?;
        Ok(self.image_start.reshape((1, 1, hidden))?.broadcast_as((b, 1, hidden))?.contiguous()?)
    }
}

impl Autograd<Batch> for Embedding {
    fn name(&self) -> &str {
        "embedding"
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// Token ids of `batch` → (b, positions, hidden). If the batch has the images of its source, `x` are the soft codes
    /// (b, n, codes) of the image tokenizer that is trained with them.
    fn autograd(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.check(batch)?;
        let mut parts = Vec::new();
        for (span, tokens) in batch.parts() {
            self.push_span(*span, &tokens.ids, &mut parts)?;
            if batch.source_pixels.is_some()
                && span.is_source_image()
                && let Some(image) = parts.last_mut()
            {
                *image = straight_through(image, &with_gradient_scale(x, batch.tokenizer_gradient)?, &self.image)?;
            }
        }
        Ok(Tensor::cat(&parts, 1)?)
    }
}
