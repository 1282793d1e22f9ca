//! Decoding with a KV cache: prefill of the source, then one position per step for a batch of sequences.
//!
//! One contract, two implementations: [`Fused`] on the CPU, and [`Composed`] with stock candle ops on any other device
//! and in double precision. Tests check both against the full forward pass.

mod composed;
mod fused;
mod input;
mod packed;
mod running;

pub use input::Source;
pub use running::Running;

use super::{sequence::Span, transformer::Generator};
use crate::{
    error::{Context, Result, ensure},
    ops::packed::Format,
};
use candle_core::DType;
use composed::Composed;
use fused::Fused;
use input::Input;
use packed::PackedGenerator;
use std::sync::{Arc, OnceLock};

/// Decodes with a generator. On a CPU in f32 it uses a packed copy of the weights, made when it is first needed.
pub struct Decoder {
    generator: Arc<Generator>,
    /// Number format of the matrices in the packed copy.
    format: Format,
    packed: OnceLock<PackedGenerator>,
}

enum Path<'g> {
    Fused(Box<Fused<'g>>),
    Composed(Composed<'g>),
}

/// A batch of sequences that are being decoded. Sequences are independent; sequences with the same source share its
/// cached keys and values.
pub struct DecodeState<'g> {
    path: Path<'g>,
    target: Span,
    vocabulary: usize,
    batch: usize,
    /// Number of target positions decoded so far.
    fed: usize,
}

impl Decoder {
    /// A decoder for `generator`. Where it decodes from packed weights, the matrices are stored in `format`.
    pub fn new(generator: Arc<Generator>, format: Format) -> Self {
        Self { generator, format, packed: OnceLock::new() }
    }

    /// The generator whose weights are used.
    pub fn generator(&self) -> &Generator {
        &self.generator
    }

    /// Prefill: runs the source and the first target position of one sequence per row. Returns the logits (rows,
    /// vocabulary) of the first token: a code, or the token after `[CLS]`. The first call packs the weights; later
    /// changes of the weights have no effect.
    ///
    /// # Errors
    /// There are no rows, a row is too long, an image does not fill the grid, or a token is not in the vocabulary.
    pub fn start(&self, source: &Source) -> Result<(DecodeState<'_>, Vec<f32>)> {
        self.start_on(source, self.is_fused())
    }

    /// A batch without sequences, which text → image sequences join and leave one by one.
    ///
    /// # Errors
    /// The weights cannot be packed.
    pub fn running(&self) -> Result<Running<'_>> {
        self.running_on(self.is_fused())
    }

    /// [`Self::running`] with a given implementation.
    pub(super) fn running_on(&self, fused: bool) -> Result<Running<'_>> {
        Running::new(&self.generator, if fused { Some(self.packed()?) } else { None })
    }

    fn is_fused(&self) -> bool {
        let generator = &self.generator;
        let single = generator.params().flat_map(|params| params.values()).all(|p| p.dtype() == DType::F32);
        single && generator.device().is_cpu()
    }

    /// [`Self::start`] with a given implementation.
    pub(super) fn start_on(&self, source: &Source, fused: bool) -> Result<(DecodeState<'_>, Vec<f32>)> {
        let generator = &self.generator;
        let layout = source.layout(generator.grid(), generator.max_text())?;
        let target = layout.target();
        let path = match fused {
            true => Path::Fused(Box::new(Fused::new(self.packed()?, &layout, source)?)),
            false => Path::Composed(Composed::new(generator, &layout, source)?),
        };
        let mut state = DecodeState { path, target, vocabulary: 0, batch: source.rows(), fed: 0 };
        let logits = state.step(&source.first())?.to_vec();
        state.vocabulary = logits.len() / source.rows();
        Ok((state, logits))
    }

    fn packed(&self) -> Result<&PackedGenerator> {
        if self.packed.get().is_none() {
            // Another thread may have packed them first; its copy is the same.
            let _ = self.packed.set(PackedGenerator::new(&self.generator, self.format)?);
        }
        self.packed.get().context("the weights were not packed")
    }
}

impl DecodeState<'_> {
    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Number of logits per sequence.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Appends one token to each sequence and returns the logits (sequences, vocabulary) of the next token.
    ///
    /// # Errors
    /// The number of tokens is not the number of sequences, a token is not in the vocabulary, or the sequences are
    /// complete.
    pub fn logits_next(&mut self, tokens: &[u32]) -> Result<&mut [f32]> {
        ensure!(tokens.len() == self.batch, "{} tokens for {} sequences", tokens.len(), self.batch);
        let positions = self.target.positions();
        ensure!(self.fed < positions, "a sequence has only {positions} target positions");
        self.step(tokens)
    }

    fn step(&mut self, tokens: &[u32]) -> Result<&mut [f32]> {
        let fed = self.fed;
        let input = Input { slot: self.target.slot(fed), tokens };
        let logits = match &mut self.path {
            Path::Fused(fused) => fused.step(input, fed),
            Path::Composed(composed) => composed.step(input),
        }?;
        self.fed += 1;
        Ok(logits)
    }

    /// Replaces sequence `i` by a copy of the old sequence `index[i]`; the number of sequences may change. The cached
    /// source is never copied, and a sequence's own cache only if several sequences continue from it.
    ///
    /// # Errors
    /// `index` is empty, or an index is not below the number of sequences.
    pub fn reorder(&mut self, index: &[usize]) -> Result<()> {
        ensure!(!index.is_empty() && index.iter().all(|&i| i < self.batch), "a sequence of {index:?} does not exist");
        match &mut self.path {
            Path::Fused(fused) => fused.reorder(index, self.fed),
            Path::Composed(composed) => composed.reorder(index)?,
        }
        self.batch = index.len();
        Ok(())
    }
}
