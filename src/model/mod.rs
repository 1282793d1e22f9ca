//! (in the making)
pub mod size;
