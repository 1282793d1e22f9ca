//! The vocabulary of a task that reads texts.

use crate::{bundle::Bundle, config, error::Result, text::WordPiece};

/// Its name among the digests of a task.
pub const NAME: &str = "vocabulary";

/// The text tokenizer that the section `[text]` describes.
///
/// # Errors
/// The vocabulary is missing or damaged.
pub fn load(config: &config::Text) -> Result<WordPiece> {
    let text = match config.vocab.as_str() {
        "demo" => Bundle::open("demo")?.text()?,
        path => WordPiece::load(path)?,
    };
    Ok(text.with_normalization(config.normalize))
}

/// Digest of the tokens and their order.
pub fn digest(text: &WordPiece) -> String {
    blake3::hash(text.vocab_text().as_bytes()).to_hex().to_string()
}
