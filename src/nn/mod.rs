//! Layers of ours.

pub mod params;
pub mod segment;
