//! The sizes that a configuration takes from other files: vocabulary and image tokenizer.

use crate::{
    bounded_read,
    bundle::Bundle,
    config::{Config, ImageTokenizer},
    error::Result,
};
use std::path::Path;

/// Entries of the Chinese BERT vocabulary, assumed where the vocabulary file is not there yet.
const CHINESE_VOCABULARY: usize = 21_128;

/// A file or folder that a configuration names.
#[derive(Debug, Clone, Copy)]
pub struct InputFile<'a> {
    pub key: &'static str,
    pub path: &'a str,
    pub kind: FileKind,
    /// Whether the task cannot do without it.
    pub required: bool,
}

/// What a path must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    File,
    Folder,
    Model,
}

/// The sizes that come from other files.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Read from the tokenizer's model folder if that exists, otherwise from this configuration.
    pub tokenizer: ImageTokenizer,
    /// Whether it was read from that folder, if the task reads one.
    pub tokenizer_found: bool,
    /// Entries of the text vocabulary.
    pub vocabulary: usize,
    /// Whether they were counted in the file, if the task reads one; otherwise they are assumed.
    pub vocabulary_found: bool,
}

impl Inputs {
    /// Those of a task that reads `files`.
    ///
    /// # Errors
    /// The tokenizer's folder exists and holds a bad configuration.
    pub fn of(config: &Config, files: &[InputFile]) -> Result<Self> {
        let named = |key| files.iter().find(|file| file.key == key).map(|file| file.path);
        let tokenizer = match named("image_tokenizer.path") {
            Some("demo") => Some(Bundle::open("demo")?.image_tokenizer_folder()?.config.image_tokenizer),
            Some(path) if Path::new(path).join("config.toml").is_file() => {
                Some(Bundle::open(path)?.image_tokenizer_folder()?.config.image_tokenizer)
            }
            Some(_) => None,
            None => Some(config.image_tokenizer.clone()),
        };
        let vocabulary = match named("text.vocab") {
            Some("demo") => Some(Bundle::open("demo")?.text()?.vocab_size()),
            Some(path) => {
                let text = bounded_read::read_text(Path::new(path), bounded_read::VOCABULARY);
                text.ok().map(|text| text.lines().count())
            }
            None => Some(CHINESE_VOCABULARY),
        };
        Ok(Self {
            tokenizer_found: tokenizer.is_some(),
            tokenizer: tokenizer.unwrap_or_else(|| config.image_tokenizer.clone()),
            vocabulary_found: vocabulary.is_some(),
            vocabulary: vocabulary.unwrap_or(CHINESE_VOCABULARY),
        })
    }
}
