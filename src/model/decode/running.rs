//! A running batch of text → image sequences: they join and leave it between steps, each at a position of its own
//! (continuous batching; Yu et al., Orca, OSDI 2022).

use super::{
    Source,
    composed::Composed,
    fused::Fused,
    input::{Input, Next},
    packed::PackedGenerator,
};
use crate::{
    error::{Result, ensure},
    model::{
        sequence::{Layout, Role, Span},
        transformer::Generator,
    },
};

/// One batch over packed weights, or sequences that are decoded one by one.
enum Path<'g> {
    Fused(Box<Fused<'g>>),
    Composed(Vec<Composed<'g>>),
}

/// A running batch. The logits of a sequence depend on its own text and tokens only: on the CPU bit for bit.
pub struct Running<'g> {
    generator: &'g Generator,
    target: Span,
    path: Path<'g>,
    /// Number of target positions decoded so far, for each sequence.
    fed: Vec<usize>,
    logits: Vec<f32>,
}

impl<'g> Running<'g> {
    /// An empty batch; with packed weights all sequences are decoded together.
    pub(super) fn new(generator: &'g Generator, packed: Option<&'g PackedGenerator>) -> Result<Self> {
        let (grid, text) = (generator.grid(), Span::text(Role::Source, generator.max_text()));
        let layout = Layout::new(&[text, Span::image(Role::Target, grid.len())], grid)?;
        let path = match packed {
            Some(packed) => Path::Fused(Box::new(Fused::new(packed, &layout, &Source::text_to_image(&[]))?)),
            None => Path::Composed(Vec::new()),
        };
        Ok(Self { generator, target: layout.target(), path, fed: Vec::new(), logits: Vec::new() })
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.fed.len()
    }

    /// Prefill of one more sequence, which becomes the last one: `text` is `[CLS]`, tokens, `[SEP]`.
    ///
    /// # Errors
    /// The text is empty or too long, or a token is not in the vocabulary; the batch is as before.
    pub fn join(&mut self, text: &[u32]) -> Result<()> {
        let texts = [text.to_vec()];
        let source = Source::text_to_image(&texts);
        let layout = source.layout(self.generator.grid(), self.generator.max_text())?;
        match &mut self.path {
            Path::Fused(fused) => fused.join(text)?,
            Path::Composed(sequences) => sequences.push(Composed::new(self.generator, &layout, &source)?),
        }
        self.fed.push(0);
        Ok(())
    }

    /// Keeps the sequences `kept`, in this order; the others leave.
    ///
    /// # Errors
    /// A number is not below [`Self::sequences`], or the numbers do not increase.
    pub fn keep(&mut self, kept: &[usize]) -> Result<()> {
        let increasing = kept.windows(2).all(|pair| pair[0] < pair[1]);
        ensure!(increasing && kept.iter().all(|&i| i < self.fed.len()), "a sequence of {kept:?} does not exist");
        match &mut self.path {
            // Nothing is copied, since no sequence continues twice.
            Path::Fused(fused) => fused.reorder(kept, 0),
            Path::Composed(sequences) => {
                let mut number = 0..;
                sequences.retain(|_| number.next().is_some_and(|number| kept.contains(&number)));
            }
        }
        self.fed = kept.iter().map(|&i| self.fed[i]).collect();
        Ok(())
    }

    /// Appends one token to each sequence and returns the logits (sequences, vocabulary) of its next token. The token of a
    /// sequence that has just joined is ignored: its first position is the start of the image.
    ///
    /// # Errors
    /// There is no sequence, the number of tokens is not the number of sequences, a token is not in the vocabulary, or a
    /// sequence is complete.
    pub fn step(&mut self, tokens: &[u32]) -> Result<&mut [f32]> {
        ensure!(!tokens.is_empty(), "there is no sequence to decode");
        ensure!(tokens.len() == self.fed.len(), "{} tokens for {} sequences", tokens.len(), self.fed.len());
        let positions = self.target.positions();
        ensure!(self.fed.iter().all(|&fed| fed < positions), "a sequence has only {positions} target positions");
        let target = self.target;
        let next = |(&fed, &token): (&usize, &u32)| Next { slot: target.slot(fed), fed, token };
        let next: Vec<Next> = self.fed.iter().zip(tokens).map(next).collect();
        self.fed.iter_mut().for_each(|fed| *fed += 1);
        match &mut self.path {
            Path::Fused(fused) => fused.step_each(&next),
            Path::Composed(sequences) => {
                self.logits.clear();
                for (sequence, next) in sequences.iter_mut().zip(&next) {
                    let logits = sequence.step(Input { slot: next.slot, tokens: &[next.token] })?;
                    self.logits.extend_from_slice(logits);
                }
                Ok(&mut self.logits)
            }
        }
    }
}
