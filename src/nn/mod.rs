//! Layers, parameters and gradients: what candle-nn lacks or does slowly.

pub mod attention;
pub mod block;
pub mod block_manual;
pub mod cache;
pub mod checkpoint_file;
pub mod conv;
pub mod features;
pub mod gradients;
pub mod group_norm;
pub mod linear;
pub mod lora;
pub mod mlp_manual;
pub mod norm;
pub mod params;
pub mod pattern;
mod pickle;
pub mod post_norm_block;
pub mod segment;
pub mod slot_cache;
pub mod weights;
