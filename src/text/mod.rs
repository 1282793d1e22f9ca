//! Text to tokens and back.

mod train;
mod wordpiece;

pub use train::train;
pub use wordpiece::WordPiece;
