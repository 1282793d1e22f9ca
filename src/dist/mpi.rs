//! Ranks as processes that an MPI launcher started, on one machine or many.
//!
//! A collective is a round of messages from every rank to every other: first a [`Header`] that says what is called and
//! how much follows, then the numbers. Each rank so sees what all others call before it judges, ranks that stay away are
//! known by name, and a rank that failed says so in place of its next call. MPI's own collectives would give neither,
//! and sum in an order of their own; what travels is as much as theirs.

use super::{Call, Group, Number, Op, Place, different, late, local::panicked, wire::Link};
use crate::{
    error::{Error, Exit, Result, anyhow, ensure, exit_of, usage},
    report, runtime,
};
use ::mpi::{
    Threading,
    environment::Universe,
    request::{LocalScope, Request, scope},
    topology::SimpleCommunicator,
    traits::{Communicator, Destination, Source},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// What `vilg doctor` says.
pub const STATE: &str = "built: mpirun and srun start ranks on any number of machines";

/// This process's end of the world of processes.
pub struct World {
    rank: usize,
    world_size: usize,
    comm: Mutex<Comm>,
    /// How long a rank waits for the others.
    patience: Duration,
    /// The last call of all ranks, for messages.
    last: Mutex<Option<Call>>,
    /// Set when the run ended; changes while `comm` is locked.
    verdict: Mutex<Option<Verdict>>,
}

struct Comm(SimpleCommunicator);

// SAFETY: MPI was started so that any thread may call it while no other does, and the mutex around sees to that.
unsafe impl Send for Comm {}

/// Why there are no more collectives.
#[derive(Clone, Copy)]
enum Verdict {
    /// This rank failed and is about to tell the others.
    Own,
    /// Another rank failed: it tells why, and with this code.
    Other(Exit),
    /// Something that every rank saw.
    Alike,
}

/// What each rank tells every other before it sends: op, elements and step of the call, bytes that follow.
type Header = [u64; 4];

/// By the number that travels.
const OPS: [Op; 6] = [Op::Gather, Op::AllGather, Op::ReduceScatter, Op::AllReduce, Op::Sum, Op::Barrier];
/// In place of an op: this rank has nothing more to call.
const DONE: u64 = 100;
/// In place of an op: this rank failed, with the exit code that stands in place of the elements.
const FAILURE: u64 = 101;

/// Bytes of a message, far below what MPI can count.
const CHUNK: usize = 1 << 30;
/// How long a rank that failed waits for the others to hear of it.
const GRACE: Duration = Duration::from_secs(30);
/// For how long a waiting rank keeps its core.
const EAGER: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(100);

/// Runs `f` as this process's rank.
///
/// # Errors
/// MPI cannot be started, or is not what the launcher said. When a rank fails, no process returns from here: each
/// leaves with that rank's exit code.
pub fn run(place: &Place, patience: Duration, f: impl Fn(&Group) -> Result<()> + Sync) -> Result<()> {
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
    let neighbours = usize::try_from(comm.split_shared(comm.rank()).size())?;
    let threads = (rayon::current_num_threads() / neighbours.max(1)).max(1);

    let (comm, last, verdict) = (Mutex::new(Comm(comm)), Mutex::default(), Mutex::default());
    let group =
        Group::new(rank, world_size, Link::Processes(World { rank, world_size, comm, patience, last, verdict }));
    runtime::set_local_rank(place.local_rank.unwrap_or(rank));
    let work = || runtime::with_threads(threads, || f(&group)).and_then(|result| result);
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(rank, &*panic)));
    let Link::Processes(world) = &group.wire.link else { return result };
    match result.and_then(|()| world.done()) {
        Ok(()) => Ok(()),
        Err(error) => world.leave(&error, universe),
    }
}

impl World {
    /// Sends `parts[r]` to rank r and returns what came from each rank.
    pub fn swap<T: Number>(&self, call: Call, parts: &[&[T]]) -> Result<Vec<Vec<T>>> {
        let comm = lock(&self.comm);
        ensure!(lock(&self.verdict).is_none(), "the run ended before {call}");
        let parts: Vec<&[u8]> = parts.iter().map(|part| bytemuck::cast_slice(part)).collect();
        let said = |part: &&[u8]| [call.op as u64, call.len as u64, call.step, part.len() as u64];
        let headers = self.headers(&comm, call, &parts.iter().map(said).collect::<Vec<_>>(), None);
        self.judge(&headers)?;
        let room = |header: &Header| vec![T::zeroed(); header[3] as usize / size_of::<T>().max(1)];
        let mut received: Vec<Vec<T>> = headers.iter().map(room).collect();
        let buffers: Vec<&mut [u8]> = received.iter_mut().map(|room| bytemuck::cast_slice_mut(room)).collect();
        self.exchange(&comm, call, &parts, buffers, &Wait { own: None, patience: self.patience, eager: Duration::MAX });
        *lock(&self.last) = Some(call);
        Ok(received)
    }

    /// Waits until no rank has anything more to call.
    fn done(&self) -> Result<()> {
        let comm = lock(&self.comm);
        self.judge(&self.headers(&comm, self.end(), &self.to_all([DONE, 0, 0, 0]), None))
    }

    /// A call for messages where none is made.
    fn end(&self) -> Call {
        Call { op: Op::Barrier, len: 0, step: lock(&self.last).map_or(0, |last| last.step) }
    }

    fn to_all(&self, header: Header) -> Vec<Header> {
        vec![header; self.world_size]
    }

    /// What every rank says, where this one says `ours[r]` to rank r. `own` is the error of this rank, if it failed.
    fn headers(&self, comm: &Comm, call: Call, ours: &[Header], own: Option<&Error>) -> Vec<Header> {
        let mut theirs: Vec<Header> = vec![[0; 4]; self.world_size];
        let sent: Vec<&[u8]> = ours.iter().map(|header| bytemuck::cast_slice(header)).collect();
        let buffers = theirs.iter_mut().map(|header| bytemuck::cast_slice_mut(header)).collect();
        let patience = if own.is_some() { GRACE } else { self.patience };
        self.exchange(comm, call, &sent, buffers, &Wait { own, patience, eager: EAGER });
        theirs
    }

    /// Whether all ranks say the same.
    fn judge(&self, headers: &[Header]) -> Result<()> {
        let settle = |verdict| *lock(&self.verdict) = Some(verdict);
        if let Some(rank) = headers.iter().position(|header| header[0] == FAILURE) {
            settle(Verdict::Other(Exit::of_code(headers[rank][1] as usize)));
            return Err(anyhow!("rank {rank} ended the run"));
        }
        // Every rank must come to the same two.
        let differs = |header: &Header| header[..3] != headers[0][..3];
        let Some(other) = headers.iter().position(differs) else { return Ok(()) };
        settle(Verdict::Alike);
        Err(match (call_of(&headers[0]), call_of(&headers[other])) {
            (Some(first), Some(second)) => anyhow!(different((0, first), (other, second))),
            (None, Some(call)) => anyhow!("rank 0 is done, but rank {other} waits for it at {call}"),
            (Some(call), None) => anyhow!("rank {other} is done, but rank 0 waits for it at {call}"),
            (None, None) => anyhow!("ranks 0 and {other} end differently"),
        })
    }

    /// Sends `parts[r]` to rank r and fills `buffers[r]` with what comes from there.
    fn exchange(&self, comm: &Comm, call: Call, parts: &[&[u8]], buffers: Vec<&mut [u8]>, wait: &Wait) {
        scope(|scope| {
            let mut pending = Vec::new();
            for (rank, (part, buffer)) in parts.iter().zip(buffers).enumerate() {
                if rank == self.rank {
                    buffer.copy_from_slice(part);
                    continue;
                }
                let other = comm.0.process_at_rank(rank as i32);
                let receive = |chunk| (rank, other.immediate_receive_into(scope, chunk));
                pending.extend(buffer.chunks_mut(CHUNK).map(receive));
                pending.extend(part.chunks(CHUNK).map(|chunk| (rank, other.immediate_send(scope, chunk))));
            }
            self.complete(comm, call, pending, wait);
        });
    }

    /// Waits until all messages are through; out of patience, it ends all processes.
    fn complete<'a, 's>(&self, comm: &Comm, call: Call, mut pending: Vec<Pending<'a, 's>>, wait: &Wait) {
        let begun = Instant::now();
        loop {
            let open = |(rank, request): Pending<'a, 's>| request.test().err().map(|request| (rank, request));
            pending = pending.into_iter().filter_map(open).collect();
            if pending.is_empty() {
                return;
            }
            let waited = begun.elapsed();
            if waited > wait.patience {
                let mut missing: Vec<usize> = pending.iter().map(|(rank, _)| *rank).collect();
                missing.dedup();
                let last = *lock(&self.last);
                let missing: Vec<_> = missing.into_iter().map(|rank| (rank, last)).collect();
                let error = late(wait.patience, call, &missing);
                report::error(wait.own.unwrap_or(&error));
                comm.0.abort(wait.own.map_or(Exit::Failed, exit_of) as i32);
            }
            // Other ranks may need the core more than who waits.
            if waited < wait.eager { thread::yield_now() } else { thread::sleep(NAP) }
        }
    }

    /// Ends this process because of `error`, told once however many ranks have it.
    fn leave(&self, error: &Error, universe: Universe) -> ! {
        // What runs beside must be through: no other thread may be inside MPI when it ends.
        let comm = lock(&self.comm);
        let verdict = *lock(&self.verdict).get_or_insert(Verdict::Own);
        let (speaks, exit) = match verdict {
            Verdict::Other(exit) => (false, exit),
            Verdict::Alike => (self.rank == 0, exit_of(error)),
            Verdict::Own => {
                let exit = exit_of(error);
                let headers = self.headers(&comm, self.end(), &self.to_all([FAILURE, exit as u64, 0, 0]), Some(error));
                let all_failed = headers.iter().all(|header| header[0] == FAILURE);
                (!all_failed || self.rank == 0, exit)
            }
        };
        if speaks {
            report::error(error);
        }
        drop(universe);
        report::leave(exit)
    }
}

/// A message under way, to or from a rank.
type Pending<'a, 's> = (usize, Request<'a, [u8], &'s LocalScope<'a>>);

/// How to wait for messages.
struct Wait<'e> {
    /// This rank's own error, told instead of who is missing.
    own: Option<&'e Error>,
    patience: Duration,
    /// For how long to keep the core.
    eager: Duration,
}

fn call_of(header: &Header) -> Option<Call> {
    let op = *OPS.get(header[0] as usize)?;
    Some(Call { op, len: header[1] as usize, step: header[2] })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
