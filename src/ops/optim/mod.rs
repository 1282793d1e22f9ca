//! Optimizer steps: AdamW, and Muon with its Newton–Schulz iteration.

pub mod adamw;
mod adamw_cuda;
mod adamw_on_device;
pub mod muon;
mod muon_on_device;
mod newton_schulz;

pub use adamw::{AdamW, adamw_step};
pub use adamw_on_device::adamw_step_on_device;
pub use muon::{Muon, muon_step};
pub use muon_on_device::muon_step_on_device;
