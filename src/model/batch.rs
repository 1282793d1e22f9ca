//! A batch of sequences: the token ids of each span, and the scale of the loss.

use super::sequence::{Layout, Modality, Span, split};
use crate::{
    error::{Context, Result, bail, ensure},
    nn::pattern::{Grid, Pattern},
    ops::attention::KeyRanges,
    text::WordPiece,
    tokenizer::PixelBatch,
};
use candle_core::{DType, Device, Tensor};
use std::{cell::RefCell, rc::Rc, sync::Arc};

/// The token ids of one span, one row per sample.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// (b, length) u32. A text is `[CLS]`, tokens, `[SEP]`, padding; a dropped condition is `[CLS] [SEP]`. An image
    /// is its codes in raster order.
    pub ids: Tensor,
    /// Number of tokens of each row that are not padding.
    pub lengths: Vec<usize>,
}

impl Tokens {
    /// Rows of token ids, padded to `width`.
    ///
    /// # Errors
    /// A row is empty or longer than `width`.
    pub fn pad(rows: &[Vec<u32>], width: usize, padding: u32, device: &Device) -> Result<Self> {
        let mut ids = Vec::with_capacity(rows.len() * width);
        for row in rows {
            let length = row.len();
            ensure!((1..=width).contains(&length), "a text of {length} tokens does not fit 1 to {width} positions");
            ids.extend(row.iter().copied().chain(std::iter::repeat_n(padding, width - length)));
        }
        let ids = Tensor::from_vec(ids, (rows.len(), width), device)?.to_dtype(DType::U32)?;
        Ok(Self { ids, lengths: rows.iter().map(Vec::len).collect() })
    }

    /// Texts `[CLS] .. [SEP]` of at most `max_tokens`, padded to the longest.
    ///
    /// # Errors
    /// There is no text, or `max_tokens` is too small for any of it.
    pub fn of_texts<'a>(
        text: &WordPiece,
        texts: impl IntoIterator<Item = &'a str>,
        max_tokens: usize,
        device: &Device,
    ) -> Result<Self> {
        let rows = texts.into_iter().map(|one| text.encode(one, max_tokens)).collect::<Result<Vec<_>>>()?;
        let width = rows.iter().map(Vec::len).max().context("no texts")?;
        Self::pad(&rows, width, text.pad(), device)
    }

    /// Rows without padding: `ids` (b, length) u32.
    ///
    /// # Errors
    /// `ids` does not have two dimensions.
    pub fn whole(ids: Tensor) -> Result<Self> {
        let (b, length) = ids.dims2()?;
        Ok(Self { ids, lengths: vec![length; b] })
    }

    /// Number of tokens of each row, padding included.
    pub fn width(&self) -> usize {
        self.ids.dims().get(1).copied().unwrap_or(0)
    }
}

/// Sequences that share one list of spans.
#[derive(Debug, Clone)]
pub struct Batch {
    sources: Vec<(Span, Tokens)>,
    target: (Span, Tokens),
    /// The loss is `loss_scale` · Σ −log p(target token).
    pub loss_scale: f64,
    /// The images themselves, in end-to-end training: the loss of their reconstruction is added.
    pub pixels: Option<Rc<PixelBatch>>,
    /// Scale of the gradient that the loss of the reconstruction sends into the hidden states. 1: as it is.
    pub generator_gradient: f64,
    /// The images of the source, where the image tokenizer is trained with image → text.
    pub source_pixels: Option<Rc<PixelBatch>>,
    /// Scale of the gradient that the image tokenizer then gets. 1: as it is.
    pub tokenizer_gradient: f64,
    /// The keys of each pattern. All layers with a pattern share them, with what a device keeps of them.
    keys: RefCell<Vec<(Grid, Pattern, Arc<KeyRanges>)>>,
}

impl Batch {
    /// Sequences with any list of spans, the tokens of each span, and a `loss_scale` of 1.
    ///
    /// # Errors
    /// The list is not a sequence (one or more sources followed by one target, at most one image and one source text,
    /// no empty span), the tokens do not match their spans, or the spans differ in their number of rows.
    pub fn new(spans: &[Span], tokens: Vec<Tokens>) -> Result<Self> {
        let (sources, target) = split(spans)?;
        ensure!(tokens.len() == spans.len(), "tokens of {} spans for {spans:?}", tokens.len());
        let rows = tokens.first().map_or(0, |tokens| tokens.lengths.len());
        for (span, Tokens { ids, lengths }) in spans.iter().zip(&tokens) {
            let fits = |&length: &usize| match span.modality {
                Modality::Text => (1..=span.length).contains(&length),
                Modality::Image => length == span.length,
            };
            ensure!(
                ids.dims() == [rows, span.length] && lengths.len() == rows && lengths.iter().all(fits),
                "{rows} samples: token ids {:?} with the lengths {lengths:?} do not fit {span:?}",
                ids.dims()
            );
        }
        let mut tokens = tokens.into_iter();
        let sources = sources.iter().copied().zip(tokens.by_ref()).collect();
        let Some(tokens) = tokens.next() else { bail!("a sequence without a target") };
        let target = (target, tokens);
        Ok(Self {
            sources,
            target,
            loss_scale: 1.0,
            pixels: None,
            generator_gradient: 1.0,
            source_pixels: None,
            tokenizer_gradient: 1.0,
            keys: RefCell::default(),
        })
    }

    /// Text → image ([`Span::text_to_image`]); `codes` (b, n) u32.
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn text_to_image(text: Tokens, codes: Tensor) -> Result<Self> {
        let codes = Tokens::whole(codes)?;
        Self::new(&Span::text_to_image(text.ids.dim(1)?, codes.ids.dim(1)?), vec![text, codes])
    }

    /// The same sequences, with the last code of a target image as an input too ([`Span::reads_last`]).
    #[must_use]
    pub fn reading_last(self) -> Self {
        Self { target: (self.target.0.reading_last(), self.target.1), keys: RefCell::default(), ..self }
    }

    /// Image → text ([`Span::image_to_text`]); `codes` (b, n) u32.
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn image_to_text(codes: Tensor, text: Tokens) -> Result<Self> {
        let codes = Tokens::whole(codes)?;
        Self::new(&Span::image_to_text(codes.ids.dim(1)?, text.ids.dim(1)?), vec![codes, text])
    }

    /// Visual question answering ([`Span::visual_question`]); `codes` (b, n) u32.
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn visual_question(codes: Tensor, question: Tokens, answer: Tokens) -> Result<Self> {
        let codes = Tokens::whole(codes)?;
        let spans = Span::visual_question(codes.ids.dim(1)?, question.ids.dim(1)?, answer.ids.dim(1)?);
        Self::new(&spans, vec![codes, question, answer])
    }

    /// The layout of the sequences over a grid of image codes.
    ///
    /// # Errors
    /// The image does not fill the grid.
    pub fn layout(&self, grid: Grid) -> Result<Layout> {
        let spans: Vec<Span> = self.parts().map(|(span, _)| *span).collect();
        Layout::new(&spans, grid)
    }

    /// The keys that each query attends to under a layer's pattern, over a grid of image codes.
    ///
    /// # Errors
    /// The image does not fill the grid.
    pub fn keys(&self, grid: Grid, pattern: Pattern) -> Result<Arc<KeyRanges>> {
        let mut known = self.keys.borrow_mut();
        if let Some((.., keys)) = known.iter().find(|(of, under, _)| (*of, *under) == (grid, pattern)) {
            return Ok(keys.clone());
        }
        let keys = self.layout(grid)?.keys(pattern, self.source_lengths());
        known.push((grid, pattern, keys.clone()));
        Ok(keys)
    }

    /// Each span with its tokens, in order.
    pub fn parts(&self) -> impl Iterator<Item = &(Span, Tokens)> {
        self.sources.iter().chain([&self.target])
    }

    /// The target span and its tokens.
    pub fn target(&self) -> (Span, &Tokens) {
        (self.target.0, &self.target.1)
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.target.1.lengths.len()
    }

    /// The device of the token ids.
    pub fn device(&self) -> &Device {
        self.target.1.ids.device()
    }

    /// Number of tokens of each sample's source text; empty if no source is text.
    pub fn source_lengths(&self) -> &[usize] {
        let text = self.sources.iter().find(|(span, _)| span.modality == Modality::Text);
        text.map_or(&[], |(_, tokens)| &tokens.lengths)
    }

    /// Number of positions of all source spans.
    pub fn source_positions(&self) -> usize {
        self.sources.iter().map(|(span, _)| span.positions()).sum()
    }

    /// Number of predicted tokens, without padding.
    pub fn targets(&self) -> usize {
        let (span, tokens) = self.target();
        match span.modality {
            Modality::Image => tokens.ids.elem_count(),
            Modality::Text => tokens.lengths.iter().map(|&length| length.saturating_sub(1)).sum(),
        }
    }

    /// The tokens to predict, and their weights in the loss; both (b · predicted).
    /// Padding has weight 0.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn outputs(&self) -> Result<(Tensor, Tensor)> {
        let (span, tokens) = self.target();
        let (m, scale) = (span.length, self.loss_scale as f32);
        let (ids, weights) = match span.modality {
            Modality::Image => (tokens.ids.clone(), vec![scale; tokens.ids.elem_count()]),
            Modality::Text => {
                let weight = |&length: &usize| (1..m).map(move |i| if i < length { scale } else { 0.0 });
                (tokens.ids.narrow(1, 1, m - 1)?, tokens.lengths.iter().flat_map(weight).collect::<Vec<_>>())
            }
        };
        let count = weights.len();
        Ok((ids.contiguous()?.flatten_all()?, Tensor::from_vec(weights, count, self.device())?))
    }
}
