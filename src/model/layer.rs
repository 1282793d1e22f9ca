//! A transformer layer: a block with the attention pattern of its position in the stack.

use super::batch::Batch;
use crate::{
    config,
    error::Result,
    nn::{
        block::Block,
        params::{Params, Scope},
        pattern::{Grid, Pattern},
    },
    ops::attention::KeyRanges,
};
use std::sync::Arc;

/// One layer of the transformer.
pub struct Layer {
    pub(super) block: Block,
    pub(super) pattern: Pattern,
    grid: Grid,
    /// `blocks.i`, with i counted from 0.
    pub(super) name: String,
    pub(super) params: Params,
}

impl Layer {
    /// Layer `i`, counted from 0, over a grid of image codes; `scope` is the root scope.
    ///
    /// # Errors
    /// The hidden size is not a multiple of the heads, or a checkpoint lacks a parameter.
    pub fn new(scope: &Scope, model: &config::Model, i: usize, grid: Grid) -> Result<Self> {
        let name = format!("blocks.{i}");
        let scope = scope.at(&name);
        let block = Block::new(&scope, model)?;
        Ok(Self { block, pattern: Pattern::of_layer(i + 1, model), grid, name, params: scope.params() })
    }

    /// Which keys each query of a batch attends to in this layer.
    pub(super) fn keys(&self, batch: &Batch) -> Result<Arc<KeyRanges>> {
        batch.keys(self.grid, self.pattern)
    }
}
