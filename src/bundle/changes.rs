//! What is changed when a model folder is copied.

use super::Bundle;

/// What a copy of a model folder has that the original has not.
#[derive(Debug, Clone, Copy, Default)]
pub struct Changes<'a> {
    /// In place of a generator's own image tokenizer.
    pub tokenizer: Option<&'a Bundle>,
    /// Without the reconstructor of an end-to-end generator, which makes it one of two-stage training.
    pub two_stage: bool,
}
