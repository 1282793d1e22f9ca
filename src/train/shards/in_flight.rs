//! What is in flight between the ranks: one state machine for every unit's weights and gradients, whether they travel as
//! floats on the host ([`host`](super::host)) or as tensors on devices ([`device`](super::device)).
//!
//! | | weights | gradients |
//! | --- | --- | --- |
//! | here | resident | accumulating over the micro-batches |
//! | in flight | all-gather | reduce-scatter (stage 0: all-reduce) |
//! | gone | freed (stage 3) | reduced: with their owner |
//!
//! With [`Group::overlap`](crate::dist::Group::overlap) a unit's weights are in flight while the unit before it computes,
//! and its gradients while the next one does; at most one unit's of each. Sums are added in the same order either way, so
//! that the bits are the same.

use super::{
    super::layout::length,
    Piece, Shards,
    device::Tensors,
    host::{Sums, Words},
};
use crate::{error::Result, ops};
use candle_core::Tensor;
use std::mem;

/// Where a unit's weights are.
pub(super) enum WeightState {
    /// The variables hold them.
    Resident,
    /// The variables still hold what they held before.
    InFlight(AllGather),
    /// The variables are empty.
    Freed,
}

/// Where a unit's gradients of this step are.
pub(super) enum GradientState {
    Accumulating,
    InFlight(Reduction),
    /// Summed over the ranks.
    Reduced,
}

/// The all-gather of a unit's weights.
pub(super) enum AllGather {
    Host(Words),
    Device(Tensors),
}

/// The reduce-scatter of a unit's gradients, or their all-reduce at stage 0.
pub(super) struct Reduction {
    /// The elements of the unit whose sums this rank receives.
    pieces: Vec<Piece>,
    sums: ReducedParts,
}

enum ReducedParts {
    Host(Sums),
    /// On the device: kernels that read it wait there.
    Device(Tensor),
}

/// A segment's passes: the weights it needs, and the gradients it leaves.
impl Shards<'_> {
    /// Before a segment's pass: waits for its weights, and starts the all-gather of those of the segment after it (stage 3).
    ///
    /// # Errors
    /// A rank does not come.
    pub fn all_gather(&mut self, unit: usize, next: Option<usize>) -> Result<()> {
        if let WeightState::Freed = self.parameter_groups[unit].weights {
            self.start_weights(unit)?;
        }
        self.complete_weights(unit)?;
        let freed = |unit: &usize| matches!(self.parameter_groups[*unit].weights, WeightState::Freed);
        match next.filter(|next| self.group.overlaps() && freed(next)) {
            Some(next) => self.start_weights(next),
            None => Ok(()),
        }
    }

    /// After a segment's pass: frees its weights (stage 3).
    ///
    /// # Errors
    /// A variable cannot be emptied.
    pub fn reshard(&mut self, unit: usize) -> Result<()> {
        if self.stage < 3 {
            return Ok(());
        }
        let unit = &mut self.parameter_groups[unit];
        for piece in unit.pieces.iter().flatten() {
            ops::replace(&self.params[&piece.name], Vec::new())?;
        }
        unit.weights = WeightState::Freed;
        Ok(())
    }

    /// Has `edit` change a segment's weights outside of an update, alike on all ranks.
    ///
    /// # Errors
    /// Those of `edit`; a rank does not come.
    pub fn edit(&mut self, unit: usize, edit: impl FnOnce() -> Result<()>) -> Result<()> {
        self.all_gather(unit, None)?;
        edit()?;
        for Piece { name, .. } in self.parameter_groups[unit].pieces.iter().flatten() {
            if let (Some(range), Some(weights)) = (self.owned.get(name), self.masters.weights.get_mut(name)) {
                ops::with_slice(&self.params[name], |all: &[f32]| weights.set(&all[range.clone()]))??;
            }
        }
        self.reshard(unit)?;
        self.update_device_parts()
    }

    /// After a segment's backward pass: starts the reduction of its gradients, where the stage or the step wants it now.
    ///
    /// # Errors
    /// A rank does not come.
    pub fn reduce_scatter(&mut self, unit: usize) -> Result<()> {
        for piece in
            self.parameter_groups[unit].pieces.iter().flatten().filter(|piece| self.handling[&piece.name].frozen)
        {
            self.gradients.free(&piece.name);
        }
        if self.stage >= 2 {
            self.start_reduction(unit)?;
            for piece in self.parameter_groups[unit].pieces.iter().flatten() {
                self.gradients.free(&piece.name);
            }
        } else if self.last && self.group.overlaps() {
            self.start_reduction(unit)?;
        }
        Ok(())
    }
}

/// A step: its beginning, its end, and what follows the update.
impl Shards<'_> {
    /// Forgets the last step's gradients.
    pub fn begin(&mut self, step: u64) {
        self.group.begin_step(step);
        self.gradients.clear();
        self.sums.clear();
        self.last = false;
        self.parameter_groups.iter_mut().for_each(|unit| unit.gradients = GradientState::Accumulating);
    }

    /// The next backward pass over each chain is its last of the step: a segment's gradients are complete when it ends.
    pub fn last_micro_batch(&mut self) {
        self.last = true;
    }

    /// After the last micro-batch: reduces what was not reduced yet, and waits for what is in flight.
    ///
    /// # Errors
    /// A rank does not come.
    pub fn finish(&mut self) -> Result<()> {
        if self.group.world_size() > 1 && self.stage < 2 {
            for unit in 0..self.parameter_groups.len() {
                if let GradientState::Accumulating = self.parameter_groups[unit].gradients {
                    self.start_reduction(unit)?;
                }
            }
        }
        self.complete_reductions()
    }

    /// After the update: gathers the weights that others own (stages 1 and 2), and renews variables that are copies of
    /// the weights.
    ///
    /// # Errors
    /// A rank does not come.
    pub fn refresh(&mut self) -> Result<()> {
        if self.stage == 3 {
            return self.update_device_parts();
        }
        if self.stage == 0 && !self.masters.copied {
            return Ok(());
        }
        let parameter_groups = self.parameter_groups.len();
        (0..parameter_groups.min(1)).try_for_each(|first| self.start_weights(first))?;
        for unit in 0..parameter_groups {
            if unit + 1 < parameter_groups {
                self.start_weights(unit + 1)?;
            }
            self.complete_weights(unit)?;
        }
        Ok(())
    }
}

/// The transitions.
impl Shards<'_> {
    fn start_weights(&mut self, unit: usize) -> Result<()> {
        let all_gather = match self.masters.copied {
            true => AllGather::Device(self.all_gather_tensors(unit)?),
            false => AllGather::Host(self.all_gather_words(unit)?),
        };
        self.parameter_groups[unit].weights = WeightState::InFlight(all_gather);
        Ok(())
    }

    /// Waits for weights that are in flight; those that are freed stay so.
    fn complete_weights(&mut self, unit: usize) -> Result<()> {
        let WeightState::InFlight(_) = self.parameter_groups[unit].weights else { return Ok(()) };
        match mem::replace(&mut self.parameter_groups[unit].weights, WeightState::Resident) {
            WeightState::InFlight(AllGather::Host(words)) => self.take_words(unit, words),
            WeightState::InFlight(AllGather::Device(tensors)) => self.take_tensors(unit, &tensors),
            WeightState::Resident | WeightState::Freed => Ok(()),
        }
    }

    /// Starts to sum a unit's gradients over all ranks, after the last unit's have come.
    fn start_reduction(&mut self, unit: usize) -> Result<()> {
        self.complete_reductions()?;
        let mut pieces = self.live_pieces(unit);
        let counts: Vec<usize> = pieces.iter().map(length).collect();
        // Nothing in it has a gradient in this step: on all ranks alike.
        if counts.iter().all(|count| *count == 0) {
            self.parameter_groups[unit].gradients = GradientState::Reduced;
            return Ok(());
        }
        let sums = match self.masters.copied {
            true => ReducedParts::Device(self.reduce_tensors(&pieces, &counts)?),
            false => ReducedParts::Host(self.reduce_floats(&pieces, &counts)?),
        };
        let pieces = pieces.swap_remove(self.owner);
        self.parameter_groups[unit].gradients = GradientState::InFlight(Reduction { pieces, sums });
        if self.group.overlaps() { Ok(()) } else { self.complete_reductions() }
    }

    /// Waits for the sums in flight: they replace this rank's own gradients (stage 0), or are added to those it owns.
    fn complete_reductions(&mut self) -> Result<()> {
        for unit in 0..self.parameter_groups.len() {
            let GradientState::InFlight(_) = self.parameter_groups[unit].gradients else { continue };
            let state = mem::replace(&mut self.parameter_groups[unit].gradients, GradientState::Reduced);
            match state {
                GradientState::InFlight(Reduction { pieces, sums: ReducedParts::Host(sums) }) => {
                    self.take_sums(&pieces, sums)?;
                }
                GradientState::InFlight(Reduction { pieces, sums: ReducedParts::Device(sums) }) => {
                    self.take_sum_tensor(&pieces, &sums)?;
                }
                GradientState::Accumulating | GradientState::Reduced => {}
            }
        }
        Ok(())
    }

    /// The pieces of a unit that have gradients, by rank.
    fn live_pieces(&self, unit: usize) -> Vec<Vec<Piece>> {
        let live = |pieces: &Vec<Piece>| -> Vec<Piece> {
            pieces.iter().filter(|piece| self.gradients.get(&piece.name).is_some()).cloned().collect()
        };
        self.parameter_groups[unit].pieces.iter().map(live).collect()
    }
}
