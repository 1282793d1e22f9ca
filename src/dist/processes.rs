//! Ranks as processes that a launcher started: this process is one of them.

use super::{
    Group,
    launcher::{Master, Place},
    local::panicked,
    mpi, tcp,
    wire::Link,
    world::{Carrier, World},
};
use crate::{error::Result, runtime};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

/// Runs `f` as this process's rank; messages go over TCP.
///
/// # Errors
/// The ranks do not find each other in time. When a rank fails, no process returns from here: each leaves with that
/// rank's exit code.
pub fn run_tcp(
    place: &Place,
    master: &Master,
    patience: Duration,
    f: impl Fn(&Group) -> Result<()> + Sync,
) -> Result<()> {
    let (mesh, neighbours) = tcp::Mesh::connect(place.rank, place.world_size, master, patience)?;
    run(place, neighbours, Carrier::Tcp(mesh), patience, || {}, f)
}

/// Runs `f` as this process's rank; messages go over MPI.
///
/// # Errors
/// MPI cannot be started, or is not what the launcher said. When a rank fails, as [`run_tcp`].
pub fn run_mpi(place: &Place, patience: Duration, f: impl Fn(&Group) -> Result<()> + Sync) -> Result<()> {
    let (comm, universe, neighbours) = mpi::Comm::start(place)?;
    run(place, neighbours, Carrier::Mpi(comm), patience, || universe.end(), f)
}

/// Runs `f` as this process's rank, one of `neighbours` that share its processors; `end` is called
/// before this process exits because of a failure.
///
/// # Errors
/// When a rank fails, no process returns from here: each leaves with that rank's exit code.
fn run(
    place: &Place,
    neighbours: usize,
    carrier: Carrier,
    patience: Duration,
    end: impl FnOnce(),
    f: impl Fn(&Group) -> Result<()> + Sync,
) -> Result<()> {
    let (rank, world_size) = (place.rank, place.world_size);
    let threads = (rayon::current_num_threads() / neighbours).max(1);
    runtime::set_local_rank(place.local_rank.unwrap_or(rank));
    let world = World::new((rank, world_size), carrier, patience);
    let group = Group::new(rank, world_size, Link::Processes(world));
    let work = || runtime::with_threads(threads, || f(&group)).and_then(|result| result);
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(rank, &*panic)));
    let Link::Processes(world) = &group.wire.link else { return result };
    match result.and_then(|()| world.done()) {
        Ok(()) => Ok(()),
        Err(error) => world.leave(&error, end),
    }
}
