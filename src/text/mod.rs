//! Text tokenizer: text to token ids and back.

mod normalize;
mod train;
mod wordpiece;

pub use normalize::normalize;
pub use train::train;
pub use wordpiece::WordPiece;
