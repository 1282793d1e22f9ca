//! Layer normalization and group normalization.

pub mod group_norm;
pub mod layer_norm;
pub mod layer_norm_cuda;

pub use group_norm::group_norm;
pub use layer_norm::layer_norm;
