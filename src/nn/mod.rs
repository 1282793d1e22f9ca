//! Layers of ours.

pub mod attention;
pub mod block;
pub mod block_native;
pub mod cache;
pub mod conv;
pub mod features;
pub mod gradients;
pub mod group_norm;
pub mod linear;
pub mod norm;
pub mod params;
pub mod pattern;
pub mod segment;
pub mod slot_cache;
pub mod weights;
