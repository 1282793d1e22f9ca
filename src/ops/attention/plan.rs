//! The order in which the keys of a batch are read: blocks of adjacent queries, each against spans of keys.

use super::{
    kernel::LANES,
    key_ranges::{KeyRanges, Run},
};
use std::ops::Range;

/// Keys at the places `start..start + len` that the same queries of a block attend to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub start: usize,
    pub len: usize,
    /// Bit i is set if query i of the block attends to these keys.
    pub lanes: u16,
}

/// Up to [`LANES`] queries by place, and the range of the plan's spans with their keys.
pub(super) struct Block {
    pub queries: Range<usize>,
    pub spans: Range<usize>,
}

/// The reading order, the same for all heads and samples.
pub(super) struct Plan {
    /// The position at each place; the codes of a column are at adjacent places.
    pub order: Vec<usize>,
    pub blocks: Vec<Block>,
    pub spans: Vec<Span>,
}

/// Positions covered by strided runs, reordered so that these runs become contiguous.
struct Columns {
    range: Range<usize>,
    stride: usize,
    /// The place of each position of `range`.
    places: Vec<usize>,
}

impl Columns {
    fn of(keys: &KeyRanges) -> Self {
        let strided = |run: &&Run| run.stride > 1 && run.len > 1;
        let stride = keys.lists.runs.iter().find(strided).map_or(1, |run| run.stride);
        let runs = keys.lists.runs.iter().filter(strided).filter(|run| run.stride == stride);
        let ends = runs.map(|run| (run.start, run.start + (run.len - 1) * stride + 1));
        let mut range = ends.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).map_or(0..0, |(start, end)| start..end);
        // Padding is skipped as a range of places; where reordering would split that range, nothing is reordered.
        if keys.text_lengths.is_some() && range.start < keys.lists.text.end && keys.lists.text.start < range.end {
            range = 0..0;
        }
        let mut places = vec![0; range.len()];
        let columns = (0..stride.min(range.len())).flat_map(|first| (first..range.len()).step_by(stride));
        columns.zip(range.clone()).for_each(|(offset, place)| places[offset] = place);
        Self { range, stride, places }
    }

    fn place(&self, position: usize) -> usize {
        if self.range.contains(&position) { self.places[position - self.range.start] } else { position }
    }

    /// Calls `f` with the ranges of places that together contain a run.
    fn places(&self, run: &Run, mut f: impl FnMut(Range<usize>)) {
        let Run { start, len, stride } = *run;
        if len == 0 {
            return;
        }
        let end = start + (len - 1) * stride + 1;
        let inside = self.range.start <= start && end <= self.range.end;
        let outside = end <= self.range.start || self.range.end <= start;
        let around = start <= self.range.start && self.range.end <= end;
        if stride == 1 && (outside || around) {
            f(start..end);
        } else if stride == self.stride && inside {
            f(self.place(start)..self.place(start) + len);
        } else {
            (0..len).map(|i| self.place(start + i * stride)).for_each(|place| f(place..place + 1));
        }
    }
}

impl Plan {
    pub fn new(keys: &KeyRanges) -> Self {
        let positions = keys.lists.offsets.len() - 1;
        let columns = Columns::of(keys);
        let mut order = vec![0; positions];
        (0..positions).for_each(|position| order[columns.place(position)] = position);
        let mut plan = Self { order, blocks: Vec::new(), spans: Vec::new() };
        let (mut start, mut end, mut events) = (0, plan.alignment(keys, &columns), Vec::new());
        while start < positions {
            let queries = start..end.min(positions);
            if !queries.is_empty() {
                plan.push_block(keys, &columns, queries, &mut events);
            }
            (start, end) = (end, end + LANES);
        }
        plan
    }

    /// Offset (modulo [`LANES`]) of the blocks, so that most rows or columns of codes start a block: where the last
    /// runs of adjacent queries are disjoint.
    fn alignment(&self, keys: &KeyRanges, columns: &Columns) -> usize {
        let (mut counts, mut previous) = ([0; LANES], 0..0);
        for (place, &position) in self.order.iter().enumerate() {
            let mut last = 0..0;
            if let Some(run) = keys.lists.runs_of(position).last() {
                columns.places(run, |range| last = range);
            }
            if previous.end <= last.start || last.end <= previous.start {
                counts[place % LANES] += 1;
            }
            previous = last;
        }
        let best = (0..LANES).max_by_key(|&i| (counts[i], LANES - i)).unwrap_or(0);
        if counts[best] >= 4 { best } else { 0 }
    }

    /// Sweeps over the places where runs start and end; `events` is a reusable buffer.
    fn push_block(
        &mut self,
        keys: &KeyRanges,
        columns: &Columns,
        queries: Range<usize>,
        events: &mut Vec<(usize, u16)>,
    ) {
        events.clear();
        for (lane, &position) in self.order[queries.clone()].iter().enumerate() {
            for run in keys.lists.runs_of(position) {
                columns.places(run, |range| events.extend([(range.start, 1 << lane), (range.end, 1 << lane)]));
            }
        }
        events.sort_unstable_by_key(|event| event.0);
        let first = self.spans.len();
        let (mut start, mut lanes) = (0, 0);
        for &(place, lane) in &*events {
            if place > start {
                if lanes != 0 {
                    self.spans.push(Span { start, len: place - start, lanes });
                }
                start = place;
            }
            // No key is listed twice, so where two runs of a query meet, one ends where the other starts.
            lanes ^= lane;
        }
        self.blocks.push(Block { queries, spans: first..self.spans.len() });
    }
}
