//! Text tokenizer: text to token ids and back.

mod train;
mod wordpiece;

pub use train::train;
pub use wordpiece::WordPiece;
