//! Half and double the height and width of an image.

pub mod max_pool;
pub mod upsample;

pub use max_pool::max_pool2x;
pub use upsample::upsample_nearest2x;
