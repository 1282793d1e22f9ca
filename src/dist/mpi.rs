//! Transport between processes started by an MPI launcher.

use super::{
    launcher::Place,
    wait::{Lost, Wait},
};
use crate::{
    error::{Exit, Result, anyhow, ensure, usage},
    runtime,
};
use ::mpi::{
    Threading,
    request::{LocalScope, Request, scope},
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives, Destination, Source},
};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Instant,
};

/// The line of `vilg doctor` about MPI.
pub const STATE: &str = "built: mpirun and srun start ranks on any number of machines";

pub struct Comm(SimpleCommunicator);

// SAFETY: MPI was initialized so that any thread may call it as long as no other does, which the mutex around it
// ensures.
unsafe impl Send for Comm {}

/// Maximum size of a message in bytes, far below MPI's limit of 2³¹ elements.
const CHUNK: usize = 1 << 30;

/// Digest of the processors that this rank may use.
fn processors() -> u64 {
    let mut hasher = DefaultHasher::new();
    runtime::allowed_processors().hash(&mut hasher);
    hasher.finish()
}

/// MPI's environment in this process.
pub struct Universe(::mpi::environment::Universe);

impl Universe {
    /// Ends MPI in this process.
    pub fn end(self) {
        drop(self.0);
    }
}

impl Comm {
    /// Starts MPI in this process; also returns the number of ranks that share this rank's processors, itself included.
    ///
    /// # Errors
    /// MPI cannot be started, or is not what the launcher said.
    pub fn start(place: &Place) -> Result<(Self, Universe, usize)> {
        let Some((universe, threading)) = ::mpi::initialize_with_threading(Threading::Serialized) else {
            return Err(anyhow!("MPI was started before"));
        };
        ensure!(threading >= Threading::Serialized, "this MPI is not made for programs with threads");
        let comm = universe.world();
        let (rank, world_size) = (usize::try_from(comm.rank())?, usize::try_from(comm.size())?);
        let (launcher, said) = (place.launcher, (place.rank, place.world_size));
        let what = format!("{launcher} says rank {} of {}, MPI says rank {rank} of {world_size}", said.0, said.1);
        let hint = "start with the mpirun of the MPI that vilg was built with (or srun --mpi=pmix)";
        ensure!((rank, world_size) == said, usage(what, hint));
        let host = comm.split_shared(comm.rank());
        let (own, mut all) = (processors(), vec![0; usize::try_from(host.size())?]);
        host.all_gather_into(&own, &mut all[..]);
        let neighbours = all.iter().filter(|processors| **processors == own).count().max(1);
        Ok((Self(comm), Universe(universe), neighbours))
    }

    /// Sends `parts[r]` to rank r and fills `buffers[r]` with what comes from there; `own` is this rank. Out of
    /// patience, it ends all processes with the exit code that `told` gives.
    pub fn exchange(
        &self,
        own: usize,
        parts: &[&[u8]],
        buffers: Vec<&mut [u8]>,
        wait: &Wait,
        told: impl FnOnce(Lost) -> Exit,
    ) {
        scope(|scope| {
            let mut pending = Vec::new();
            for (rank, (part, buffer)) in parts.iter().zip(buffers).enumerate().filter(|(rank, _)| *rank != own) {
                let other = self.0.process_at_rank(rank as i32);
                let receive = |chunk| (rank, other.immediate_receive_into(scope, chunk));
                pending.extend(buffer.chunks_mut(CHUNK).map(receive));
                pending.extend(part.chunks(CHUNK).map(|chunk| (rank, other.immediate_send(scope, chunk))));
            }
            let begun = Instant::now();
            loop {
                pending = pending.into_iter().filter_map(open).collect();
                if pending.is_empty() {
                    return;
                }
                let waited = begun.elapsed();
                if waited > wait.patience {
                    let mut missing: Vec<usize> = pending.iter().map(|(rank, _)| *rank).collect();
                    missing.dedup();
                    self.0.abort(told(Lost::Late(missing)) as i32);
                }
                wait.rest(waited);
            }
        });
    }
}

/// Returns the message unless it is complete.
fn open<'a, 's>((rank, request): Pending<'a, 's>) -> Option<Pending<'a, 's>> {
    request.test().err().map(|request| (rank, request))
}

/// A message in flight to or from a rank.
type Pending<'a, 's> = (usize, Request<'a, [u8], &'s LocalScope<'a>>);
