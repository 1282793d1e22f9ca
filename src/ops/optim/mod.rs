//! Optimizer steps: AdamW, and Muon with its Newton–Schulz iteration.

pub mod adamw;
pub mod muon;
mod newton_schulz;

pub use adamw::{AdamW, adamw_step};
pub use muon::{Muon, muon_step};
