//! Replaces [`mpi`](super::mpi) in a build without MPI.

use super::{Group, Place};
use crate::error::{Result, usage};
use std::time::Duration;

/// The line of `vilg doctor` about MPI.
pub const STATE: &str = "not built (cargo build --release --features mpi)";

/// Always an error.
///
/// # Errors
/// This build has no MPI: each process would train by itself, in the same folder.
pub fn run(place: &Place, _patience: Duration, _f: impl Fn(&Group) -> Result<()> + Sync) -> Result<()> {
    let Place { launcher, rank, world_size, .. } = place;
    let what = format!("{launcher} started this as rank {rank} of {world_size}, but it was built without `mpi`");
    Err(usage(what, "rebuild with `cargo build --release --features mpi`, start with torchrun, or start one process"))
}
