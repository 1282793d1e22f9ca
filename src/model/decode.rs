//! Decoding with a cache: the source once, then one position a step for a batch of sequences.
//!
//! One contract, two implementations: [`Fused`] on the CPU, and [`Composed`] from stock candle ops on any other device
//! and in double precision. Tests hold both equal to the whole forward pass.

use super::{
    composed::Composed,
    fused::Fused,
    packed::PackedGenerator,
    sequence::{Direction, Layout},
    transformer::Generator,
};
use crate::{
    error::{Context, Result, ensure},
    nn::cache::Place,
    ops::packed::Format,
};
use candle_core::DType;
use std::sync::OnceLock;

/// What a batch of sequences starts from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// Paint: each row is `[CLS]`, tokens, `[SEP]`.
    Text(&'a [Vec<u32>]),
    /// Describe: each row is the n codes of an image in raster order.
    Image { codes: &'a [Vec<u32>], cls: u32 },
}

/// What the next position of each sequence holds.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    /// The start of the image.
    Start,
    /// Codes at this place of the grid.
    Code(&'a [u32], usize),
    /// Tokens at this position of the text.
    Token(&'a [u32], usize),
}

impl Input<'_> {
    pub(super) fn place(&self) -> Place {
        match *self {
            Input::Start | Input::Token(..) => Place::Dense,
            Input::Code(_, place) => Place::Image(place),
        }
    }
}

/// How a generator decodes on the CPU: what its weights are packed in, and they themselves once they are needed.
pub struct Decoding {
    format: Format,
    weights: OnceLock<PackedGenerator>,
}

impl Default for Decoding {
    fn default() -> Self {
        Self { format: Format::F32, weights: OnceLock::new() }
    }
}

enum Path<'g> {
    Fused(Box<Fused<'g>>),
    Composed(Composed<'g>),
}

/// A batch of sequences on the way. Sequences are independent; those of one source share what is cached of it.
pub struct DecodeState<'g> {
    path: Path<'g>,
    layout: Layout,
    vocabulary: usize,
    batch: usize,
    /// Target positions fed so far.
    fed: usize,
}

impl Generator {
    /// The same generator, decoding with weights stored in `format` (f32 before).
    pub fn decode_in(self, format: Format) -> Self {
        Self { decoding: Decoding { format, weights: OnceLock::new() }, ..self }
    }

    /// Runs the source and the first target position of one sequence a row. Returns the logits (rows, vocabulary) of the
    /// first token: a code, or the token after `[CLS]`. The first call packs the weights; later changes of them are not seen.
    ///
    /// # Errors
    /// There are no rows, or one that is too long; a token is not in the vocabulary.
    pub fn decode_start(&self, source: Source) -> Result<(DecodeState<'_>, Vec<f32>)> {
        let single = self.segments().iter().flat_map(|s| s.params().values()).all(|p| p.dtype() == DType::F32);
        self.start(source, single && self.embedding.device().is_cpu())
    }

    pub(super) fn start(&self, source: Source, fused: bool) -> Result<(DecodeState<'_>, Vec<f32>)> {
        let (direction, rows) = match source {
            Source::Text(rows) => (Direction::TextToImage, rows),
            Source::Image { codes, .. } => (Direction::ImageToText, codes),
        };
        let mut layout = self.layout(direction);
        if direction == Direction::TextToImage {
            // No text is longer than the longest: what is cached need not have room for all positions.
            layout.text = rows.iter().map(Vec::len).max().context("no sequence to decode")?.min(layout.text);
        }
        ensure!(!rows.is_empty(), "no sequence to decode");
        let path = match fused {
            true => Path::Fused(Box::new(Fused::new(self.packed()?, layout, source)?)),
            false => Path::Composed(Composed::new(self, layout, rows)?),
        };
        let mut state = DecodeState { path, layout, vocabulary: 0, batch: rows.len(), fed: 0 };
        let logits = match source {
            Source::Text(_) => state.step(Input::Start)?,
            Source::Image { cls, .. } => state.step(Input::Token(&vec![cls; rows.len()], 0))?,
        };
        let logits = logits.to_vec();
        state.vocabulary = logits.len() / rows.len();
        Ok((state, logits))
    }

    fn packed(&self) -> Result<&PackedGenerator> {
        let Decoding { format, weights } = &self.decoding;
        if weights.get().is_none() {
            // Another thread may have been faster; its copy is as good.
            let _ = weights.set(PackedGenerator::new(self, *format)?);
        }
        weights.get().context("the weights were not packed")
    }
}

impl DecodeState<'_> {
    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Logits of each sequence.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Appends one token to each sequence and returns the logits (sequences, vocabulary) of the next, row by row.
    ///
    /// # Errors
    /// The number of tokens is not that of the sequences, one is not in the vocabulary, or the sequences are full.
    pub fn logits_next(&mut self, tokens: &[u32]) -> Result<&mut [f32]> {
        ensure!(tokens.len() == self.batch, "{} tokens for {} sequences", tokens.len(), self.batch);
        ensure!(self.fed < self.layout.target(), "a sequence has only {} target positions", self.layout.target());
        match self.layout.direction {
            Direction::TextToImage => self.step(Input::Code(tokens, self.fed - 1)),
            Direction::ImageToText => self.step(Input::Token(tokens, self.fed)),
        }
    }

    fn step(&mut self, input: Input) -> Result<&mut [f32]> {
        let fed = self.fed;
        let logits = match &mut self.path {
            Path::Fused(fused) => fused.step(input, fed),
            Path::Composed(composed) => composed.step(input),
        }?;
        self.fed += 1;
        Ok(logits)
    }

    /// Sequence `i` goes on as a copy of what was sequence `index[i]`; the number of sequences may change. What is
    /// cached of the source is never copied, and of a sequence only where several go on from it.
    ///
    /// # Errors
    /// An index is not below the number of sequences, or there is none.
    pub fn reorder(&mut self, index: &[usize]) -> Result<()> {
        ensure!(!index.is_empty() && index.iter().all(|&i| i < self.batch), "no such sequence in {index:?}");
        match &mut self.path {
            Path::Fused(fused) => fused.reorder(index, self.fed),
            Path::Composed(composed) => composed.reorder(index)?,
        }
        self.batch = index.len();
        Ok(())
    }
}
