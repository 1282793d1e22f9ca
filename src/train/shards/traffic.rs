//! What a rank sends of a segment's weights and gradients, and takes in.

use super::Shards;
use crate::{
    dist::Pending,
    error::Result,
    ops::{self, gemm::Onto},
    train::layout::Piece,
};
use candle_core::Shape;
use std::{collections::HashMap, sync::Arc};

/// Every rank's part of a unit, in rank order.
pub struct Parts {
    words: Pending<Vec<Arc<Vec<f32>>>>,
    /// Whether weights that products round came rounded, two in a word.
    rounded: bool,
}

/// A piece as it came.
pub struct Arrived<'a> {
    pub rank: usize,
    pub piece: &'a Piece,
    words: &'a [f32],
    rounded: bool,
}

impl Arrived<'_> {
    pub fn write(&self, values: &mut [f32]) {
        if self.rounded { ops::bf16_pairs::unpack(self.words, values) } else { values.copy_from_slice(self.words) }
    }
}

pub struct Going {
    /// What of the unit this rank gets the sums of.
    pieces: Vec<Piece>,
    sums: Pending<Vec<f32>>,
}

impl Shards<'_> {
    /// Whole parameters of a unit, put together from what the ranks that own them sent.
    pub(super) fn whole(&self, unit: usize, parts: Parts) -> Result<HashMap<String, Vec<f32>>> {
        let mut full = HashMap::new();
        self.receive_weights(unit, parts, |arrived| {
            let name = &arrived.piece.name;
            let len = self.params[name].elem_count();
            let whole = full.entry(name.clone()).or_insert_with(|| vec![0.0; len]);
            let ours = &mut whole[arrived.piece.range.clone()];
            if arrived.rounded && arrived.rank == self.group.shard_rank() {
                // The optimizer may find its weights in the variable that these become.
                self.with_part(name, |weights| ours.copy_from_slice(weights))
            } else {
                arrived.write(ours);
                Ok(())
            }
        })?;
        Ok(full)
    }

    /// Sends this rank's weights of a unit to all ranks: in bf16 those that every product rounds to it before use.
    pub(super) fn send_weights(&self, unit: usize) -> Result<Parts> {
        self.send(unit, true, |name, words| {
            self.with_part(name, |weights| match self.handling[name].rounded {
                true => ops::bf16_pairs::pack(weights, words),
                false => words.extend_from_slice(weights),
            })
        })
    }

    /// Sends what `part` gives of this rank's part of a unit to all ranks.
    pub(super) fn send_exactly(&self, unit: usize, part: impl Fn(&Self, &str) -> Result<Vec<f32>>) -> Result<Parts> {
        self.send(unit, false, |name, words| {
            words.extend(part(self, name)?);
            Ok(())
        })
    }

    fn send(&self, unit: usize, rounded: bool, put: impl Fn(&str, &mut Vec<f32>) -> Result<()>) -> Result<Parts> {
        let pieces = &self.units[unit].pieces;
        let count = |pieces: &Vec<Piece>| pieces.iter().map(|piece| self.words(piece, rounded)).sum();
        let counts: Vec<usize> = pieces.iter().map(count).collect();
        let mut ours = Vec::with_capacity(counts[self.group.shard_rank()]);
        pieces[self.group.shard_rank()].iter().try_for_each(|piece| put(&piece.name, &mut ours))?;
        Ok(Parts { words: self.group.all_gather(ours, &counts)?, rounded })
    }

    /// How many words a piece takes on its way.
    fn words(&self, piece: &Piece, rounded: bool) -> usize {
        if rounded && self.handling[&piece.name].rounded { piece.range.len().div_ceil(2) } else { piece.range.len() }
    }

    /// Every rank's part of a unit, piece by piece.
    pub(super) fn receive_weights(
        &self,
        unit: usize,
        parts: Parts,
        mut take: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let words = parts.words.wait()?;
        for (rank, (pieces, words)) in self.units[unit].pieces.iter().zip(words).enumerate() {
            let mut rest = words.as_slice();
            for piece in pieces {
                let (words, after) = rest.split_at(self.words(piece, parts.rounded));
                let rounded = parts.rounded && self.handling[&piece.name].rounded;
                take(Arrived { rank, piece, words, rounded })?;
                rest = after;
            }
        }
        Ok(())
    }

    /// Sends a unit's gradients to be summed over all ranks, after the last unit's have come.
    pub(super) fn send_gradients(&mut self, unit: usize) -> Result<()> {
        if self.copied {
            return self.sum_tensors(unit);
        }
        self.receive_sums()?;
        let mut pieces = self.live(unit);
        let counts: Vec<usize> = pieces.iter().map(|pieces| length(pieces)).collect();
        let mut all = Vec::with_capacity(counts.iter().sum());
        for piece in pieces.iter().flatten() {
            if let Some(gradient) = self.gradients.get(&piece.name) {
                ops::with_slice(gradient, |values: &[f32]| all.extend_from_slice(&values[piece.range.clone()]))?;
            }
        }
        let (ours, sums) = if self.replicated() {
            (0, self.group.all_reduce(all))
        } else {
            (self.group.shard_rank(), self.group.reduce_scatter(all, &counts)?)
        };
        self.units[unit].sent = true;
        self.going = Some(Going { pieces: pieces.swap_remove(ours), sums });
        if self.group.overlaps() { Ok(()) } else { self.receive_sums() }
    }

    /// The pieces of a unit that have gradients, by rank.
    pub(super) fn live(&self, unit: usize) -> Vec<Vec<Piece>> {
        let live = |pieces: &Vec<Piece>| -> Vec<Piece> {
            pieces.iter().filter(|piece| self.gradients.get(&piece.name).is_some()).cloned().collect()
        };
        self.units[unit].pieces.iter().map(live).collect()
    }

    /// Waits for the sums under way: in place of this rank's own gradients, or added to those it owns.
    pub(super) fn receive_sums(&mut self) -> Result<()> {
        let Some(Going { pieces, sums }) = self.going.take() else { return Ok(()) };
        let sums = sums.wait()?;
        let mut rest = sums.as_slice();
        for piece in &pieces {
            let (part, after) = rest.split_at(piece.range.len());
            rest = after;
            if !self.replicated() {
                self.sums.accumulate(&piece.name, &Shape::from(part.len()), |sum, onto| match onto {
                    Onto::Nothing => sum.copy_from_slice(part),
                    Onto::Old => ops::slices::add(sum, part),
                })?;
            } else if let Some(gradient) = self.gradients.get(&piece.name) {
                ops::with_slice_mut(gradient, |sum: &mut [f32]| sum.copy_from_slice(part))?;
            }
        }
        Ok(())
    }
}

/// How many elements pieces have together.
pub(super) fn length<'a>(pieces: impl IntoIterator<Item = &'a Piece>) -> usize {
    pieces.into_iter().map(|piece| piece.range.len()).sum()
}
