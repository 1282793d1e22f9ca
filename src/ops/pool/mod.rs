//! 2 × 2 max pooling, and upsampling by 2.

pub mod max_pool;
pub mod upsample;

pub use max_pool::max_pool2x;
pub use upsample::upsample_nearest2x;
