//! What a rank sends of a segment's weights and gradients, and takes in.

use super::Shards;
use crate::{
    dist::Pending,
    error::Result,
    ops::{self, gemm::Onto},
    train::layout::Piece,
};
use candle_core::{Shape, Tensor};
use std::{collections::HashMap, sync::Arc};

/// A unit's weights on their way.
pub(super) enum Weights {
    Floats(Parts),
    /// On the device: by type, every rank's part in rank order.
    Tensors(Vec<Vec<Tensor>>),
}

/// Every rank's part of a unit, in rank order.
pub(super) struct Parts {
    words: Pending<Vec<Arc<Vec<f32>>>>,
    /// Whether weights that products round came rounded, two in a word.
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

/// A unit's gradients on their way.
pub(super) struct Going {
    /// What of the unit this rank gets the sums of.
    pub pieces: Vec<Piece>,
    pub sums: Sums,
}

pub(super) enum Sums {
    Floats(Pending<Vec<f32>>),
    /// On the device, where whoever reads them waits.
    Tensor(Tensor),
}

impl Shards<'_> {
    /// Whole parameters of a unit, put together from what the ranks that own them sent.
    pub(super) fn whole(&self, unit: usize, parts: Parts) -> Result<HashMap<String, Vec<f32>>> {
        let mut full = HashMap::new();
        self.each_piece(unit, parts, |arrived| {
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
    pub(super) fn send_weights(&self, unit: usize) -> Result<Weights> {
        if self.copied {
            return self.send_copies(unit);
        }
        let put = |name: &str, words: &mut Vec<f32>| {
            self.with_part(name, |weights| match self.handling[name].rounded {
                true => ops::bf16_pairs::pack(weights, words),
                false => words.extend_from_slice(weights),
            })
        };
        Ok(Weights::Floats(self.send(unit, true, put)?))
    }

    /// The variables of a unit become what all ranks sent.
    pub(super) fn receive_weights(&self, unit: usize, weights: Weights) -> Result<()> {
        match weights {
            Weights::Tensors(parts) => self.receive_copies(unit, &parts),
            Weights::Floats(parts) if self.stage == 3 => {
                for (name, values) in self.whole(unit, parts)? {
                    ops::replace(&self.params[&name], values)?;
                }
                Ok(())
            }
            Weights::Floats(parts) => self.each_piece(unit, parts, |arrived| {
                // What this rank owns is there already, and exact.
                if arrived.rank == self.group.shard_rank() {
                    return Ok(());
                }
                let write = |weights: &mut [f32]| arrived.write(&mut weights[arrived.piece.range.clone()]);
                Ok(ops::with_slice_mut(&self.params[&arrived.piece.name], write)?)
            }),
        }
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
    fn each_piece(&self, unit: usize, parts: Parts, mut take: impl FnMut(Arrived) -> Result<()>) -> Result<()> {
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
        self.receive_sums()?;
        let mut pieces = self.live(unit);
        let counts: Vec<usize> = pieces.iter().map(length).collect();
        self.units[unit].sent = true;
        // Nothing in it has a gradient in this step: on all ranks alike.
        if counts.iter().all(|count| *count == 0) {
            return Ok(());
        }
        let sums = match self.copied {
            true => Sums::Tensor(self.sum_tensors(&pieces, &counts)?),
            false => Sums::Floats(self.sum_floats(&pieces, &counts)?),
        };
        self.going = Some(Going { pieces: pieces.swap_remove(self.owner), sums });
        if self.group.overlaps() { Ok(()) } else { self.receive_sums() }
    }

    fn sum_floats(&self, pieces: &[Vec<Piece>], counts: &[usize]) -> Result<Pending<Vec<f32>>> {
        let mut all = Vec::with_capacity(counts.iter().sum());
        for piece in pieces.iter().flatten() {
            if let Some(gradient) = self.gradients.get(&piece.name) {
                ops::with_slice(gradient, |values: &[f32]| all.extend_from_slice(&values[piece.range.clone()]))?;
            }
        }
        if self.replicated() { Ok(self.group.all_reduce(all)) } else { self.group.reduce_scatter(all, counts) }
    }

    /// The pieces of a unit that have gradients, by rank.
    fn live(&self, unit: usize) -> Vec<Vec<Piece>> {
        let live = |pieces: &Vec<Piece>| -> Vec<Piece> {
            pieces.iter().filter(|piece| self.gradients.get(&piece.name).is_some()).cloned().collect()
        };
        self.units[unit].pieces.iter().map(live).collect()
    }

    /// Waits for the sums under way: in place of this rank's own gradients, or added to those it owns.
    pub(super) fn receive_sums(&mut self) -> Result<()> {
        let Some(Going { pieces, sums }) = self.going.take() else { return Ok(()) };
        let sums = match sums {
            Sums::Tensor(sums) => return self.receive_tensor(&pieces, &sums),
            Sums::Floats(sums) => sums.wait()?,
        };
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
