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
pub type Parts = Pending<Vec<Arc<Vec<f32>>>>;

pub struct Going {
    /// What of the unit this rank gets the sums of.
    pieces: Vec<Piece>,
    sums: Pending<Vec<f32>>,
}

impl Shards<'_> {
    /// Whole parameters of a unit, put together from what the ranks that own them sent.
    pub(super) fn whole(&self, unit: usize, parts: Parts) -> Result<HashMap<String, Vec<f32>>> {
        let mut full = HashMap::new();
        self.receive_weights(unit, parts, |piece, values| {
            let len = self.params[&piece.name].elem_count();
            let whole = full.entry(piece.name.clone()).or_insert_with(|| vec![0.0; len]);
            whole[piece.range.clone()].copy_from_slice(values);
            Ok(())
        })?;
        Ok(full)
    }

    /// Sends what `part` gives of this rank's part of a unit to all ranks.
    pub(super) fn send_weights(&self, unit: usize, part: impl Fn(&Self, &str) -> Result<Vec<f32>>) -> Result<Parts> {
        let pieces = &self.units[unit].pieces;
        let counts: Vec<usize> = pieces.iter().map(|pieces| length(pieces)).collect();
        let mut ours = Vec::with_capacity(counts[self.group.shard_rank()]);
        for piece in &pieces[self.group.shard_rank()] {
            ours.extend(part(self, &piece.name)?);
        }
        self.group.all_gather(ours, &counts)
    }

    /// Every rank's part of a unit, piece by piece.
    pub(super) fn receive_weights(
        &self,
        unit: usize,
        parts: Parts,
        mut take: impl FnMut(&Piece, &[f32]) -> Result<()>,
    ) -> Result<()> {
        for (pieces, values) in self.units[unit].pieces.iter().zip(parts.wait()?) {
            let mut rest = values.as_slice();
            for piece in pieces {
                let (part, after) = rest.split_at(piece.range.len());
                take(piece, part)?;
                rest = after;
            }
        }
        Ok(())
    }

    /// Sends a unit's gradients to be summed over all ranks, after the last unit's have come.
    pub(super) fn send_gradients(&mut self, unit: usize) -> Result<()> {
        self.receive_sums()?;
        let live = |pieces: &Vec<Piece>| -> Vec<Piece> {
            pieces.iter().filter(|piece| self.gradients.get(&piece.name).is_some()).cloned().collect()
        };
        let mut pieces: Vec<Vec<Piece>> = self.units[unit].pieces.iter().map(live).collect();
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

fn length(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.range.len()).sum()
}
