//! Inputs of decoding: the source of each sequence, and the tokens of one step.

use crate::{
    error::{Context, Result, ensure},
    model::sequence::{Layout, Modality, Role, Slot, Span},
    nn::{cache::Place, pattern::Grid},
};

/// Where a batch of sequences starts: the tokens of each source span (one row per sequence), and the target's modality.
#[derive(Debug, Clone)]
pub struct Source<'a> {
    /// Tokens of each source span, in the order of the spans.
    sources: Vec<(Modality, &'a [Vec<u32>])>,
    /// The first input of a target text; `None` if the target is an image.
    cls: Option<u32>,
}

impl<'a> Source<'a> {
    /// Any source spans in order, each with its rows: a text row is `[CLS]`, tokens, `[SEP]` without padding; an image
    /// row is the n codes of an image in raster order. A target text starts with `cls`; with `None` the target is an
    /// image.
    pub fn new(sources: Vec<(Modality, &'a [Vec<u32>])>, cls: Option<u32>) -> Self {
        Self { sources, cls }
    }

    /// Text → image.
    pub fn text_to_image(texts: &'a [Vec<u32>]) -> Self {
        Self::new(vec![(Modality::Text, texts)], None)
    }

    /// Image → text.
    pub fn image_to_text(codes: &'a [Vec<u32>], cls: u32) -> Self {
        Self::new(vec![(Modality::Image, codes)], Some(cls))
    }

    /// Visual question answering: the image and the question of each sequence.
    pub fn visual_question(codes: &'a [Vec<u32>], questions: &'a [Vec<u32>], cls: u32) -> Self {
        Self::new(vec![(Modality::Image, codes), (Modality::Text, questions)], Some(cls))
    }

    /// Number of sequences.
    pub fn rows(&self) -> usize {
        self.sources.first().map_or(0, |(_, rows)| rows.len())
    }

    /// The rows of a modality; empty if no source has it.
    pub(super) fn of(&self, modality: Modality) -> &'a [Vec<u32>] {
        let found = self.sources.iter().find(|(found, _)| *found == modality);
        found.map_or(&[], |(_, rows)| rows)
    }

    /// The tokens of each source span, in order.
    pub(super) fn spans(&self) -> impl Iterator<Item = &'a [Vec<u32>]> {
        self.sources.iter().map(|(_, rows)| *rows)
    }

    /// Number of tokens of each row of the source text; empty if no source is text.
    pub(super) fn text_lengths(&self) -> Vec<usize> {
        self.of(Modality::Text).iter().map(Vec::len).collect()
    }

    /// The layout of the sequences. The source text gets the length of the longest row: the cache needs no more
    /// positions.
    ///
    /// # Errors
    /// There are no rows, or the spans differ in their number of rows; a text is longer than `max_text`, or an image
    /// does not fill the grid.
    pub(super) fn layout(&self, grid: Grid, max_text: usize) -> Result<Layout> {
        let (texts, codes) = (self.of(Modality::Text), self.of(Modality::Image));
        ensure!(self.rows() > 0, "there is no sequence to decode");
        ensure!(self.spans().all(|rows| rows.len() == self.rows()), "sources differ in their number of sequences");
        let bad = texts.iter().map(Vec::len).find(|length| !(1..=max_text).contains(length));
        ensure!(bad.is_none(), "a source text of {} tokens, for 1 to {max_text} positions", bad.unwrap_or(0));
        let bad = codes.iter().map(Vec::len).find(|length| *length != grid.len());
        ensure!(bad.is_none(), "a source of {} codes, for a grid of {}", bad.unwrap_or(0), grid.len());
        let text = texts.iter().map(Vec::len).max().unwrap_or(0);
        let source = |&(modality, _): &(Modality, _)| match modality {
            Modality::Text => Span::text(Role::Source, text),
            Modality::Image => Span::image(Role::Source, grid.len()),
        };
        let target = match self.cls {
            Some(_) => Span::text(Role::Target, max_text),
            None => Span::image(Role::Target, grid.len()),
        };
        let spans: Vec<Span> = self.sources.iter().map(source).chain([target]).collect();
        Layout::new(&spans, grid)
    }

    /// The inputs of the first target position.
    pub(super) fn first(&self) -> Vec<u32> {
        vec![self.cls.unwrap_or(0); self.rows()]
    }
}

/// The inputs of one step: the slot of the position, and the token of each sequence (ignored at [`Slot::Start`]).
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub slot: Slot,
    pub tokens: &'a [u32],
}

impl Input<'_> {
    /// The slot of the cache that keeps the position.
    pub fn place(&self) -> Place {
        place(self.slot)
    }

    /// The token of sequence `row`.
    ///
    /// # Errors
    /// `row` is not below the number of tokens.
    pub fn token(&self, row: usize) -> Result<u32> {
        self.tokens.get(row).copied().with_context(|| format!("no token for sequence {row}"))
    }
}

/// The input of one sequence, whose position may differ from those of others.
#[derive(Clone, Copy)]
pub(super) struct Next {
    pub slot: Slot,
    /// Number of target positions before this one.
    pub fed: usize,
    /// Ignored at [`Slot::Start`].
    pub token: u32,
}

/// The slot of the cache that keeps a position.
pub(super) fn place(slot: Slot) -> Place {
    match slot {
        Slot::Start | Slot::Text(_) => Place::Dense,
        Slot::Image(place) => Place::Image(place),
    }
}
