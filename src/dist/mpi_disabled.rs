//! What stands in for [`mpi`](super::mpi) in a build without it.

use super::{Group, Place};
use crate::error::{Result, usage};
use std::time::Duration;

/// What `vilg doctor` says.
pub const STATE: &str = "not built (cargo build --release --features mpi)";

/// # Errors
/// Always: each of the processes would train on its own, in the same folder.
pub fn run(place: &Place, _patience: Duration, _f: impl Fn(&Group) -> Result<()> + Sync) -> Result<()> {
    let Place { launcher, rank, world_size, .. } = place;
    let what = format!("{launcher} started this as rank {rank} of {world_size}, but it was built without `mpi`");
    Err(usage(what, "rebuild with `cargo build --release --features mpi`, start with torchrun, or start one process"))
}
