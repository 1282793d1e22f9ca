//! Replaces [`mpi`](super::mpi) in a build without MPI.

use super::{
    launcher::Place,
    wait::{Lost, Wait},
};
use crate::error::{Exit, Result, usage};
use std::convert::Infallible;

/// The state of MPI in `vilg doctor`.
pub const STATE: &str = "not built (cargo build --release --features mpi)";

/// Never made.
pub struct Comm(Infallible);

/// Never made.
pub struct Universe(Infallible);

impl Universe {
    pub fn end(self) {
        match self.0 {}
    }
}

impl Comm {
    /// # Errors
    /// Always: each of the processes would train on its own, in the same folder.
    pub fn start(place: &Place) -> Result<(Self, Universe, usize)> {
        let Place { launcher, rank, world_size, .. } = place;
        let what = format!("{launcher} started this as rank {rank} of {world_size}, but it was built without `mpi`");
        Err(usage(
            what,
            "rebuild with `cargo build --release --features mpi`, start with torchrun, or start one process",
        ))
    }

    pub fn exchange(
        &self,
        _own: usize,
        _parts: &[&[u8]],
        _buffers: Vec<&mut [u8]>,
        _wait: &Wait,
        _told: impl FnOnce(Lost) -> Exit,
    ) {
        match self.0 {}
    }
}
