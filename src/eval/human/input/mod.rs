//! Reads what `vilg` and other systems wrote: folders of images with their prompts, captions, and answers.

mod answers;
mod captions;
mod folder;
mod images;
mod json;
mod prompts;
#[cfg(test)]
mod tests;

pub use answers::answers;
pub use captions::captions;
pub use images::images;

use std::path::PathBuf;

/// A system and where its outputs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub name: String,
    pub path: PathBuf,
    pub is_human: bool,
}
