//! Collectives between CUDA devices, over NCCL. **They have never run on a GPU.**

#[cfg(feature = "nccl")]
#[path = "nccl/enabled.rs"]
mod backend;
#[cfg(not(feature = "nccl"))]
#[path = "nccl/disabled.rs"]
mod backend;

pub use backend::Nccl;
