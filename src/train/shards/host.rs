//! Weights and gradients that travel as f32 words on the host.

use super::{Piece, Shards};
use crate::{
    dist::Pending,
    error::Result,
    ops::{self, gemm::Beta},
};
use candle_core::Shape;
use std::{collections::HashMap, sync::Arc};

/// Every rank's part of a unit in flight, in rank order.
pub(super) struct Words {
    words: Pending<Vec<Arc<Vec<f32>>>>,
    /// Whether weights that products round to bf16 travel in it, two in a word.
    rounded: bool,
}

/// A piece as it came.
struct Arrived<'a> {
    rank: usize,
    piece: &'a Piece,
    words: &'a [f32],
    rounded: bool,
}

impl Arrived<'_> {
    fn write(&self, values: &mut [f32]) {
        if self.rounded { ops::bf16_pairs::unpack(self.words, values) } else { values.copy_from_slice(self.words) }
    }
}

/// This rank's sums of gradients in flight.
pub(super) type Sums = Pending<Vec<f32>>;

impl Shards<'_> {
    /// Sends this rank's weights of a unit to all ranks of its replica, those that every product rounds to bf16 as bf16.
    pub(super) fn all_gather_words(&self, unit: usize) -> Result<Words> {
        self.send(unit, true, |name, words| {
            self.with_part(name, |weights| match self.handling[name].rounded {
                true => ops::bf16_pairs::pack(weights, words),
                false => words.extend_from_slice(weights),
            })
        })
    }

    /// Sets the variables of a unit to what all ranks sent.
    pub(super) fn take_words(&self, unit: usize, words: Words) -> Result<()> {
        if self.stage == 3 {
            for (name, values) in self.whole(unit, words)? {
                ops::replace(&self.params[&name], values)?;
            }
            return Ok(());
        }
        self.each_piece(unit, words, |arrived| {
            // What this rank owns is there already, and exact.
            if arrived.rank == self.group.shard_rank() {
                return Ok(());
            }
            let write = |weights: &mut [f32]| arrived.write(&mut weights[arrived.piece.range.clone()]);
            Ok(ops::with_slice_mut(&self.params[&arrived.piece.name], write)?)
        })
    }

    /// Whole parameters of a unit by name, put together from what the ranks that own them sent.
    pub(super) fn whole(&self, unit: usize, words: Words) -> Result<HashMap<String, Vec<f32>>> {
        let mut full = HashMap::new();
        self.each_piece(unit, words, |arrived| {
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

    /// Sends what `part` gives of this rank's part of a unit to all ranks.
    pub(super) fn send_exactly(&self, unit: usize, part: impl Fn(&Self, &str) -> Result<Vec<f32>>) -> Result<Words> {
        self.send(unit, false, |name, words| {
            words.extend(part(self, name)?);
            Ok(())
        })
    }

    fn send(&self, unit: usize, rounded: bool, put: impl Fn(&str, &mut Vec<f32>) -> Result<()>) -> Result<Words> {
        let pieces = &self.parameter_groups[unit].pieces;
        let count = |pieces: &Vec<Piece>| pieces.iter().map(|piece| self.words(piece, rounded)).sum();
        let counts: Vec<usize> = pieces.iter().map(count).collect();
        let mut ours = Vec::with_capacity(counts[self.group.shard_rank()]);
        let mut travel = pieces[self.group.shard_rank()].iter().filter(|piece| self.words(piece, rounded) > 0);
        travel.try_for_each(|piece| put(&piece.name, &mut ours))?;
        Ok(Words { words: self.group.all_gather(ours, &counts)?, rounded })
    }

    /// How many words a piece takes on its way; 0: it does not travel.
    fn words(&self, piece: &Piece, rounded: bool) -> usize {
        match rounded {
            true if self.stays(piece) => 0,
            true if self.handling[&piece.name].rounded => piece.range.len().div_ceil(2),
            _ => piece.range.len(),
        }
    }

    /// Every rank's part of a unit, piece by piece.
    fn each_piece(&self, unit: usize, words: Words, mut take: impl FnMut(Arrived) -> Result<()>) -> Result<()> {
        let Words { words, rounded } = words;
        for (rank, (pieces, words)) in self.parameter_groups[unit].pieces.iter().zip(words.wait()?).enumerate() {
            let mut rest = words.as_slice();
            for piece in pieces.iter().filter(|piece| self.words(piece, rounded) > 0) {
                let (words, after) = rest.split_at(self.words(piece, rounded));
                let rounded = rounded && self.handling[&piece.name].rounded;
                take(Arrived { rank, piece, words, rounded })?;
                rest = after;
            }
        }
        Ok(())
    }

    /// Starts to sum the gradients of these pieces, by rank, over all ranks.
    pub(super) fn reduce_floats(&self, pieces: &[Vec<Piece>], counts: &[usize]) -> Result<Sums> {
        let mut all = Vec::with_capacity(counts.iter().sum());
        for piece in pieces.iter().flatten() {
            if let Some(gradient) = self.gradients.get(&piece.name) {
                ops::with_slice(gradient, |values: &[f32]| all.extend_from_slice(&values[piece.range.clone()]))?;
            }
        }
        if self.replicated() { Ok(self.group.all_reduce(all)) } else { self.group.reduce_scatter(all, counts) }
    }

    /// Waits for the sums of these pieces; see `complete_reductions`.
    pub(super) fn take_sums(&mut self, pieces: &[Piece], sums: Sums) -> Result<()> {
        let sums = sums.wait()?;
        let mut rest = sums.as_slice();
        for piece in pieces {
            let (part, after) = rest.split_at(piece.range.len());
            rest = after;
            if !self.replicated() {
                self.sums.accumulate(&piece.name, &Shape::from(part.len()), |sum, onto| match onto {
                    Beta::Zero => sum.copy_from_slice(part),
                    Beta::One => ops::slices::add(sum, part),
                })?;
            } else if let Some(gradient) = self.gradients.get(&piece.name) {
                ops::with_slice_mut(gradient, |sum: &mut [f32]| sum.copy_from_slice(part))?;
            }
        }
        Ok(())
    }
}
