//! A segment's weights, which at stage 3 are whole only around its passes.

use super::{Piece, Shards};
use crate::{error::Result, ops};

impl Shards<'_> {
    /// Before a segment's pass: its weights come, and those of the segment after it set out (stage 3).
    pub fn gather(&mut self, unit: usize, next: Option<usize>) -> Result<()> {
        if !self.units[unit].here {
            let weights = match self.coming.take() {
                Some((coming, weights)) if coming == unit => weights,
                _ => self.send_weights(unit)?,
            };
            self.receive_weights(unit, weights)?;
            self.units[unit].here = true;
        }
        if let Some(next) = next.filter(|next| self.group.overlaps() && !self.units[*next].here) {
            self.coming = Some((next, self.send_weights(next)?));
        }
        Ok(())
    }

    /// After a segment's pass: its weights go (stage 3).
    pub fn release(&mut self, unit: usize) -> Result<()> {
        if self.stage < 3 {
            return Ok(());
        }
        let unit = &mut self.units[unit];
        for piece in unit.pieces.iter().flatten() {
            ops::replace(&self.params[&piece.name], Vec::new())?;
        }
        unit.here = false;
        Ok(())
    }

    /// Has `edit` change a segment's weights outside of an update, alike on all ranks.
    pub fn edit(&mut self, unit: usize, edit: impl FnOnce() -> Result<()>) -> Result<()> {
        self.gather(unit, None)?;
        edit()?;
        for Piece { name, .. } in self.units[unit].pieces.iter().flatten() {
            if let (Some(range), Some(weights)) = (self.owned.get(name), self.weights.get_mut(name)) {
                ops::with_slice(&self.params[name], |all: &[f32]| weights.copy_from_slice(&all[range.clone()]))?;
            }
        }
        self.release(unit)?;
        self.give_copies()
    }
}
