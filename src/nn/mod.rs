//! Layers of ours.

pub mod params;
pub mod pattern;
pub mod segment;
