//! A sequence as a list of spans: which positions attend to which, and the slot of each position (paper §2.2).
//!
//! A sequence is `[source spans | target span]`. Three lists are in use:
//!
//! | list | source | target inputs | predicted |
//! | --- | --- | --- | --- |
//! | [`Span::text_to_image`] | text | start of image, z₁ … zₙ₋₁ | z₁ … zₙ |
//! | [`Span::image_to_text`] | z₁ … zₙ | text without its last token | text without `[CLS]` |
//! | [`Span::visual_question`] | z₁ … zₙ, question | answer without its last token | answer without `[CLS]` |
//!
//! A code keeps its position in the grid and a token its position in its own text, in sources and targets alike. Slots,
//! masks, key ranges, heads, targets and loss weights all follow from the list.

use crate::{
    error::{Result, bail, ensure},
    nn::pattern::{Grid, Pattern},
    ops::attention::{Codes, KeyLists, KeyRanges, Run},
};
use candle_core::{Device, Tensor};
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// Number of lists of keys that are kept for later batches: a few patterns of a few layouts.
const RECENT_LISTS: usize = 16;

/// The kind of a span's tokens. It selects the embedding and, for a target, the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Modality {
    Text,
    Image,
}

/// Whether a span is given or predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Given: visible to every position.
    Source,
    /// Predicted token by token: visible to later positions only.
    Target,
}

/// A part of a sequence with one modality and one role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    pub modality: Modality,
    pub role: Role,
    /// Number of tokens, padding included: all codes of an image, or a text from `[CLS]` to its last padding token.
    pub length: usize,
    /// Whether the last code of a target image is an input too. Nothing is predicted there: end-to-end training reads the
    /// hidden state (paper §3.1.3).
    pub reads_last: bool,
}

/// The content of a position of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Token `i` of a text.
    Text(usize),
    /// The learned start of an image. It is outside the grid; attention treats it like text.
    Start,
    /// The code at this position of the grid, in raster order.
    Image(usize),
}

impl Span {
    /// A text of `length` tokens.
    pub const fn text(role: Role, length: usize) -> Self {
        Self { modality: Modality::Text, role, length, reads_last: false }
    }

    /// An image of `length` codes.
    pub const fn image(role: Role, length: usize) -> Self {
        Self { modality: Modality::Image, role, length, reads_last: false }
    }

    /// Whether it is an image that is given.
    pub fn is_source_image(&self) -> bool {
        self.modality == Modality::Image && self.role == Role::Source
    }

    /// Text → image: `text` tokens, then `image` codes.
    pub const fn text_to_image(text: usize, image: usize) -> [Self; 2] {
        [Self::text(Role::Source, text), Self::image(Role::Target, image)]
    }

    /// Image → text: `image` codes, then `text` tokens.
    pub const fn image_to_text(image: usize, text: usize) -> [Self; 2] {
        [Self::image(Role::Source, image), Self::text(Role::Target, text)]
    }

    /// Visual question answering: `image` codes and `question` tokens, then `answer` tokens.
    pub const fn visual_question(image: usize, question: usize, answer: usize) -> [Self; 3] {
        let [codes, answer] = Self::image_to_text(image, answer);
        [codes, Self::text(Role::Source, question), answer]
    }

    /// The same, with the last code of a target image as an input too.
    pub const fn reading_last(self) -> Self {
        Self { reads_last: true, ..self }
    }

    /// Number of positions in the sequence. The last token of a target is only predicted, never an input, unless
    /// [`Span::reads_last`]; a target image starts with the learned start token.
    pub const fn positions(&self) -> usize {
        match (self.role, self.modality) {
            (Role::Target, Modality::Image) if self.reads_last => self.length + 1,
            (Role::Target, _) => self.predicted(),
            (Role::Source, _) => self.length,
        }
    }

    /// Number of tokens that are predicted, padding included, if the span is a target: one at each of its first positions.
    pub const fn predicted(&self) -> usize {
        match self.modality {
            Modality::Text => self.length.saturating_sub(1),
            Modality::Image => self.length,
        }
    }

    /// The content of the span's position `offset`.
    pub const fn slot(&self, offset: usize) -> Slot {
        match (self.modality, self.role, offset) {
            (Modality::Text, ..) => Slot::Text(offset),
            (Modality::Image, Role::Source, _) => Slot::Image(offset),
            (Modality::Image, Role::Target, 0) => Slot::Start,
            (Modality::Image, Role::Target, _) => Slot::Image(offset - 1),
        }
    }
}

/// Splits a list of spans into its sources and its target.
///
/// # Errors
/// The list is not one or more sources followed by one target; it has a second image or a second source text (padding
/// is masked for one text only); a span is empty, or a target text has nothing to predict.
pub(super) fn split(spans: &[Span]) -> Result<(&[Span], Span)> {
    let Some((target, sources)) = spans.split_last() else { bail!("a sequence has no spans") };
    let ordered = target.role == Role::Target && sources.iter().all(|span| span.role == Role::Source);
    ensure!(ordered && !sources.is_empty(), "a sequence is one or more sources and then one target, not {spans:?}");
    let count = |spans: &[Span], modality| spans.iter().filter(|span| span.modality == modality).count();
    ensure!(
        count(spans, Modality::Image) <= 1 && count(sources, Modality::Text) <= 1,
        "a sequence has at most one image and one source text, not {spans:?}"
    );
    ensure!(
        spans.iter().all(|span| span.length > 0) && target.positions() > 0,
        "a span is empty or predicts nothing in {spans:?}"
    );
    Ok((sources, *target))
}

/// The spans of a sequence over a grid of image codes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    sources: Vec<Span>,
    target: Span,
    grid: Grid,
}

impl Layout {
    /// A layout of any list of spans.
    ///
    /// # Errors
    /// The list is not a sequence: see [`Batch::new`](super::Batch::new); or its image does not fill the grid.
    pub fn new(spans: &[Span], grid: Grid) -> Result<Self> {
        let (sources, target) = split(spans)?;
        let image = spans.iter().find(|span| span.modality == Modality::Image);
        let cells = grid.len();
        ensure!(image.is_none_or(|span| span.length == cells), "{spans:?} does not fill a grid of {cells} codes");
        Ok(Self { sources: sources.to_vec(), target, grid })
    }

    /// [`Span::text_to_image`] with `text` tokens.
    pub fn text_to_image(text: usize, grid: Grid) -> Self {
        let [source, target] = Span::text_to_image(text, grid.len());
        Self { sources: vec![source], target, grid }
    }

    /// [`Span::image_to_text`] with `text` tokens.
    pub fn image_to_text(grid: Grid, text: usize) -> Self {
        let [source, target] = Span::image_to_text(grid.len(), text);
        Self { sources: vec![source], target, grid }
    }

    /// [`Span::visual_question`] with `question` and `answer` tokens.
    pub fn visual_question(grid: Grid, question: usize, answer: usize) -> Self {
        let [image, question, target] = Span::visual_question(grid.len(), question, answer);
        Self { sources: vec![image, question], target, grid }
    }

    /// The grid of image codes.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// The source spans, in order.
    pub fn sources(&self) -> &[Span] {
        &self.sources
    }

    /// The target span, which comes last.
    pub fn target(&self) -> Span {
        self.target
    }

    /// All spans, each with the position at which it starts.
    pub fn spans(&self) -> impl Iterator<Item = (usize, Span)> {
        self.sources.iter().copied().chain([self.target]).scan(0, |next, span| {
            let start = *next;
            *next += span.positions();
            Some((start, span))
        })
    }

    /// Number of positions of all source spans; the target starts there.
    pub fn source_positions(&self) -> usize {
        self.sources.iter().map(Span::positions).sum()
    }

    /// Number of positions of the target span.
    pub fn target_positions(&self) -> usize {
        self.target.positions()
    }

    /// Number of predicted tokens, padding included: one at each of the target span's first positions.
    pub fn predicted(&self) -> usize {
        self.target.predicted()
    }

    /// The same spans, with the last code of a target image as an input too ([`Span::reads_last`]).
    #[must_use]
    pub fn reading_last(self) -> Self {
        Self { target: self.target.reading_last(), ..self }
    }

    /// Number of positions of the whole sequence.
    pub fn positions(&self) -> usize {
        self.source_positions() + self.target_positions()
    }

    /// Positions of the source text, padding included; empty if no source is text.
    pub fn source_text(&self) -> Range<usize> {
        self.source_of(Modality::Text)
    }

    /// Positions of the source span of a modality; empty if there is none.
    fn source_of(&self, modality: Modality) -> Range<usize> {
        let found = self.spans().find(|(_, span)| (span.role, span.modality) == (Role::Source, modality));
        found.map_or(0..0, |(start, span)| start..start + span.length)
    }

    /// The content of `position`. A position past the end belongs to the target.
    pub fn slot(&self, position: usize) -> Slot {
        let mut offset = position;
        for span in &self.sources {
            if offset < span.positions() {
                return span.slot(offset);
            }
            offset -= span.positions();
        }
        self.target.slot(offset)
    }

    /// The mask rule for one pair of positions. Source positions have weight 0, target position j has weight j + 1, and
    /// a query attends to keys whose weight is not above its own. In addition, codes attend to codes by the layer's
    /// pattern, and no query attends to the padding of a source text with `text_length` tokens.
    pub fn visible(&self, pattern: Pattern, text_length: usize, query: usize, key: usize) -> bool {
        let weight = |position: usize| (position + 1).saturating_sub(self.source_positions());
        if weight(key) > weight(query) {
            return false;
        }
        match (self.slot(query), self.slot(key)) {
            (_, Slot::Text(i)) if key < self.source_positions() => i < text_length,
            (Slot::Image(q), Slot::Image(k)) => pattern.visible(self.grid, self.causal(), q, k),
            _ => true,
        }
    }

    /// Whether codes attend only to codes before them.
    fn causal(&self) -> bool {
        self.target.modality == Modality::Image
    }

    /// The mask rule as key ranges. `text_lengths` are the numbers of tokens of each sample's source text
    /// ([`Batch::source_lengths`](super::Batch::source_lengths)); they are ignored if no source is text.
    pub fn keys(&self, pattern: Pattern, text_lengths: &[usize]) -> Arc<KeyRanges> {
        self.with_lengths(self.lists(pattern), text_lengths)
    }

    /// The key ranges of the source positions alone, for the prefill.
    pub fn source_keys(&self, pattern: Pattern, text_lengths: &[usize]) -> Arc<KeyRanges> {
        self.with_lengths(Arc::new(self.lists_of(pattern, 0..self.source_positions())), text_lengths)
    }

    fn with_lengths(&self, lists: Arc<KeyLists>, text_lengths: &[usize]) -> Arc<KeyRanges> {
        let text_lengths = (!self.source_text().is_empty()).then(|| text_lengths.to_vec());
        Arc::new(KeyRanges::new(lists, text_lengths))
    }

    /// The lists of all positions, which batches of one layout share, with what devices keep of them.
    fn lists(&self, pattern: Pattern) -> Arc<KeyLists> {
        static RECENT: Mutex<VecDeque<(Layout, Pattern, Arc<KeyLists>)>> = Mutex::new(VecDeque::new());
        let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., lists)) = recent.iter().find(|(layout, of, _)| layout == self && *of == pattern) {
            return lists.clone();
        }
        let lists = Arc::new(self.lists_of(pattern, 0..self.positions()));
        recent.truncate(RECENT_LISTS - 1);
        recent.push_front((self.clone(), pattern, lists.clone()));
        lists
    }

    fn lists_of(&self, pattern: Pattern, queries: Range<usize>) -> KeyLists {
        let (text, codes) = (self.source_text(), self.source_of(Modality::Image));
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        for query in queries.clone() {
            self.push_runs(pattern, &codes, query, &mut runs);
            offsets.push(runs.len());
        }
        let positions = if codes.is_empty() { self.target_codes() } else { codes };
        let positions = positions.start.min(queries.end)..positions.end.min(queries.end);
        let codes = (!positions.is_empty()).then_some(Codes { positions, width: self.grid.width });
        KeyLists::new(offsets, runs, text, codes)
    }

    /// Positions of the codes of a target image, which follow the start of the image; empty if the target is a text.
    fn target_codes(&self) -> Range<usize> {
        let source = self.source_positions();
        if self.target.modality == Modality::Image { source + 1..self.positions() } else { 0..0 }
    }

    /// Appends the runs of keys of one query; `codes` are the positions of a source image.
    fn push_runs(&self, pattern: Pattern, codes: &Range<usize>, query: usize, runs: &mut Vec<Run>) {
        let source = self.source_positions();
        let dense = |range: Range<usize>| Run { start: range.start, len: range.len(), stride: 1 };
        match self.slot(query) {
            Slot::Text(_) => runs.push(dense(0..source.max(query + 1))),
            Slot::Start => runs.extend([dense(0..source), dense(source..source + 1)]),
            Slot::Image(code) if query < source => {
                runs.extend((codes.start > 0).then(|| dense(0..codes.start)));
                pattern.runs(self.grid, false, code, |start, len, stride| {
                    runs.push(Run { start: codes.start + start, len, stride });
                });
                runs.extend((codes.end < source).then(|| dense(codes.end..source)));
            }
            Slot::Image(code) => {
                runs.extend([dense(0..source), dense(source..source + 1)]);
                pattern.runs(self.grid, true, code, |start, len, stride| {
                    runs.push(Run { start: source + 1 + start, len, stride });
                });
            }
        }
    }

    /// Padding mask (b, positions) u8 of the first `positions` positions: 0 at the padding of the source text, else 1.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn padding_mask(&self, text_lengths: &[usize], positions: usize, device: &Device) -> Result<Tensor> {
        let text = self.source_text();
        let padding = |length: usize| text.start + length..text.end;
        let row = |&length: &usize| (0..positions).map(move |i| u8::from(!padding(length).contains(&i)));
        let mask: Vec<u8> = text_lengths.iter().flat_map(row).collect();
        Ok(Tensor::from_vec(mask, (text_lengths.len(), positions), device)?)
    }

    /// The full mask (b, l, l) u8 by [`Layout::visible`], for the reference implementation. `text_lengths` has one
    /// entry per sample.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn mask(&self, pattern: Pattern, text_lengths: &[usize], device: &Device) -> Result<Tensor> {
        let l = self.positions();
        let rows = text_lengths.iter().flat_map(|&length| (0..l).map(move |query| (length, query)));
        let mask: Vec<u8> = rows
            .flat_map(|(length, query)| (0..l).map(move |key| u8::from(self.visible(pattern, length, query, key))))
            .collect();
        Ok(Tensor::from_vec(mask, (text_lengths.len(), l, l), device)?)
    }
}
