//! Ranks that train together, and their collectives, which all ranks call in the same order (paper §3.2).
//!
//! A [`Group`] is one rank's handle. Every collective checks that all ranks call the same operation with the same
//! length. If a rank fails, panics or times out, the call returns an error on all other ranks; it never hangs. Sums are
//! added in rank order, so they are bit-equal on every rank, in every run and over every transport. Ranks are threads
//! of one process ([`local`]) or processes started by a launcher ([`world`]), which communicate over MPI ([`mpi`]) or
//! TCP ([`tcp`]).
//!
//! Tensors on devices have their own collectives ([`tensors`]). Collectives of floats return a [`Pending`]: after
//! [`Group::overlap`] they run while the rank computes ([`background`]), otherwise immediately. Both give the same
//! bits.

mod background;
mod call;
mod launcher;
mod local;
mod meeting;
#[cfg_attr(not(feature = "mpi"), path = "mpi_disabled.rs")]
mod mpi;
#[cfg_attr(not(feature = "nccl"), path = "nccl_disabled.rs")]
mod nccl;
mod processes;
mod tcp;
mod tensors;
mod wait;
mod wire;
mod world;

use crate::error::{Result, ensure, failed, usage};
use background::Background;
pub use background::Pending;
pub use call::Number;
use call::{Among, Call, Op};
use candle_core::Device;
pub use launcher::{Place, place};
pub use local::launch;
pub use mpi::STATE as MPI_STATE;
use nccl::Nccl;
use std::{
    ops::Range,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use wire::{Link, Part, Wire, sum};

/// The `i`-th of `n` parts of `0..len`; sizes differ by at most one.
pub fn part(len: usize, i: usize, n: usize) -> Range<usize> {
    // In u128, because `len` × `n` may overflow.
    let at = |i: usize| (len as u128 * i as u128 / n.max(1) as u128) as usize;
    at(i)..at(i + 1)
}

/// The ranks of a run, before they start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranks {
    /// This many threads of this process.
    Threads(usize),
    /// Processes started by a launcher; this process is one of them.
    Processes(Place),
}

impl Ranks {
    /// `threads` ranks in this process, unless a launcher started several processes.
    ///
    /// # Errors
    /// Both are given, or the launcher's variables are incomplete.
    pub fn find(threads: usize) -> Result<Self> {
        match place()? {
            Some(place) if place.world_size > 1 => {
                let (launcher, world_size) = (place.launcher, place.world_size);
                let what =
                    format!("--nproc asks for {threads} ranks in each of the {world_size} processes of {launcher}");
                ensure!(threads == 1, usage(what, "leave out --nproc, or start one process"));
                Ok(Self::Processes(place))
            }
            _ => Ok(Self::Threads(threads)),
        }
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        match self {
            Self::Threads(ranks) => *ranks,
            Self::Processes(place) => place.world_size,
        }
    }

    /// Whether this process has rank 0, which prints and writes for all ranks.
    pub fn leads(&self) -> bool {
        !matches!(self, Self::Processes(place) if place.rank > 0)
    }

    /// Runs `f` on every rank, each with a share of this machine's compute threads; `patience` is the time limit for
    /// waiting for other ranks.
    ///
    /// # Errors
    /// The error of the rank that failed or panicked first; the other ranks stop at their next collective. If the ranks
    /// are processes, they exit here with the exit code of the failed rank.
    pub fn run(&self, patience: Duration, f: impl Fn(&Group) -> Result<()> + Sync) -> Result<()> {
        match self {
            Self::Threads(ranks) => launch(*ranks, patience, f).map(drop),
            Self::Processes(place @ Place { master: Some(master), .. }) => {
                processes::run_tcp(place, master, patience, f)
            }
            Self::Processes(place) => processes::run_mpi(place, patience, f),
        }
    }
}

/// One rank's handle of the group of all ranks.
pub struct Group {
    wire: Arc<Wire>,
    /// The thread that runs collectives of floats; without it, the calling thread runs them.
    background: OnceLock<Background>,
    /// The step shown in error messages.
    step: AtomicU64,
    /// Number of exchanges so far, not counting weights and gradients.
    #[cfg(test)]
    pub agreements: AtomicU64,
}

impl Group {
    /// A group of one rank.
    pub fn alone() -> Self {
        Self::new(0, 1, Link::Alone)
    }

    fn new(rank: usize, world_size: usize, link: Link) -> Self {
        let (hsdp_shard_size, nccl, events, waited) = Default::default();
        let wire = Arc::new(Wire { rank, world_size, link, hsdp_shard_size, nccl, events, waited });
        Self {
            wire,
            background: OnceLock::new(),
            step: AtomicU64::new(0),
            #[cfg(test)]
            agreements: AtomicU64::new(0),
        }
    }

    /// The number of this rank, from 0 to [`Group::world_size`] - 1.
    pub fn rank(&self) -> usize {
        self.wire.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.wire.world_size
    }

    /// Whether this is rank 0, which prints and writes for all ranks.
    pub fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// How long this rank's own thread has waited in collectives so far; while it computes, transfers cost nothing. What a
    /// device waits for over NCCL is not in it.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.wire.waited.load(Ordering::Relaxed))
    }

    /// Sets the step shown in error messages.
    pub fn begin_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Shards parameters within groups of `ranks` consecutive ranks and replicates them across groups from now on
    /// (hybrid sharded data parallel, HSDP: the large transfers stay within a node). 0: shard over all ranks.
    ///
    /// # Errors
    /// The world size is not a multiple of `ranks`.
    pub fn shard_over(&self, ranks: usize) -> Result<()> {
        let world_size = self.world_size();
        let ranks = if ranks == 0 { world_size } else { ranks };
        let what = format!("{world_size} ranks cannot be split into shard groups of {ranks} ranks");
        ensure!(
            world_size.is_multiple_of(ranks),
            usage(what, "set train.hsdp_shard_size to a divisor of the number of ranks, or to 0 (all ranks)")
        );
        ensure!(*self.wire.hsdp_shard_size.get_or_init(|| ranks) == ranks, "the shard group size has already been set");
        Ok(())
    }

    /// The number of ranks in a shard group; each group holds one replica.
    pub fn hsdp_shard_size(&self) -> usize {
        self.wire.hsdp_shard_size()
    }

    /// This rank's index in its shard group.
    pub fn shard_rank(&self) -> usize {
        self.rank() % self.hsdp_shard_size()
    }

    /// Whether this rank is in the first shard group, which writes checkpoints.
    pub fn in_first_replica(&self) -> bool {
        self.rank() < self.hsdp_shard_size()
    }

    /// Runs collectives of floats on a separate thread from now on, while the rank computes. No effect with one rank.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn overlap(&self) -> Result<()> {
        if self.world_size() > 1 && self.background.get().is_none() {
            let background = Background::start(self.wire.clone())?;
            ensure!(self.background.set(background).is_ok(), "the collective thread was started twice");
        }
        Ok(())
    }

    /// Whether collectives of floats run while the rank computes.
    pub fn overlaps(&self) -> bool {
        self.background.get().is_some()
    }

    /// Sends tensors on CUDA devices over NCCL from now on, overlapping computation if [`Group::overlap`] was called
    /// before. Floats on the host do not use NCCL.
    ///
    /// # Errors
    /// NCCL is not built in or not available, or two ranks use the same device.
    pub fn use_device(&self, device: &Device) -> Result<()> {
        if self.world_size() == 1 { Ok(()) } else { self.use_nccl(device) }
    }

    /// [`Group::use_device`], also with one rank, whose collectives need no NCCL otherwise.
    ///
    /// # Errors
    /// As [`Group::use_device`].
    pub fn use_nccl(&self, device: &Device) -> Result<()> {
        if !device.is_cuda() {
            return Ok(());
        }
        let mut nccl = Nccl::new(device, self.overlaps())?;
        let several = 1 < self.hsdp_shard_size() && self.hsdp_shard_size() < self.world_size();
        let among: &[Among] = if several { &[Among::All, Among::Shards, Among::Replicas] } else { &[Among::All] };
        for among in among {
            let members = self.wire.members(*among);
            let exchange = |ours: Option<Vec<u8>>| Ok(self.gather(ours.unwrap_or_default())?[members[0]].to_vec());
            let place = members.iter().position(|rank| *rank == self.rank()).unwrap_or(0);
            nccl.join(*among, place, members.len(), exchange)?;
        }
        ensure!(self.wire.nccl.set(Mutex::new(nccl)).is_ok(), "the devices of the group have already been set");
        Ok(())
    }

    /// Every rank's values, in rank order. Their lengths may differ.
    pub fn gather<T: Number>(&self, ours: Vec<T>) -> Result<Vec<Arc<Vec<T>>>> {
        self.to_all(Op::Gather, 0, ours)
    }

    /// The values of all ranks of this shard group, in rank order; rank r contributes `counts[r]` elements.
    ///
    /// # Errors
    /// `ours` has another length than `counts` says. Failures of the exchange are returned by [`Pending::wait`].
    pub fn all_gather(&self, ours: Vec<f32>, counts: &[usize]) -> Result<Pending<Vec<Arc<Vec<f32>>>>> {
        let expected = self.count(counts)?;
        ensure!(ours.len() == expected, "all_gather: {} elements instead of {expected}", ours.len());
        let call = self.call(Op::AllGather, counts.iter().sum());
        Ok(self.start(move |wire| wire.to_members(call, Among::Shards, ours)))
    }

    /// This rank's part of the sum of `all` over all ranks. `all` is the concatenation of one part for each rank of a
    /// shard group,
    /// `counts[r]` elements for rank r. Sums run first within the shard group, then over the replicas.
    ///
    /// # Errors
    /// As [`Group::all_gather`].
    pub fn reduce_scatter(&self, all: Vec<f32>, counts: &[usize]) -> Result<Pending<Vec<f32>>> {
        self.count(counts)?;
        let (call, counts) = (self.call(Op::ReduceScatter, counts.iter().sum()), counts.to_vec());
        ensure!(all.len() == call.len, "reduce_scatter: {} elements instead of {}", all.len(), call.len);
        let one_replica = self.hsdp_shard_size() == self.world_size();
        let parts = self.start(move |wire| {
            let parts = wire.scatter(call, Among::Shards, all, &counts)?;
            if one_replica {
                return Ok(parts);
            }
            Ok(vec![Part::whole(wire.all_reduce(call, Among::Replicas, sum(&parts))?)])
        });
        Ok(parts.map(|parts| sum(&parts)))
    }

    /// The sum over all ranks.
    pub fn all_reduce(&self, ours: Vec<f32>) -> Pending<Vec<f32>> {
        let call = self.call(Op::AllReduce, ours.len());
        self.start(move |wire| wire.all_reduce(call, Among::All, ours))
    }

    /// The element-wise sum over all ranks.
    pub fn sum(&self, ours: &[f64]) -> Result<Vec<f64>> {
        let parts = self.to_all(Op::Sum, ours.len(), ours.to_vec())?;
        Ok((0..ours.len()).map(|i| parts.iter().map(|part| part[i]).sum()).collect())
    }

    /// Waits until all ranks have called this.
    pub fn barrier(&self) -> Result<()> {
        self.to_all(Op::Barrier, 0, Vec::<u8>::new()).map(drop)
    }

    /// Checks that all ranks have the same text.
    ///
    /// # Errors
    /// A rank has another text than most ranks; the error names the first such rank, and the first line that differs.
    pub fn same(&self, what: &str, ours: &str) -> Result<()> {
        let all = self.gather(ours.as_bytes().to_vec())?;
        let ranks_with = |text: &[u8]| all.iter().filter(|other| other.as_slice() == text).count();
        // Of equally frequent texts the first rank's.
        let usual = (0..all.len()).rev().max_by_key(|rank| ranks_with(&all[*rank])).unwrap_or(0);
        let Some(odd) = all.iter().position(|text| *text != all[usual]) else { return Ok(()) };
        let lines = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
        let (theirs, usual_lines) = (lines(odd), lines(usual));
        let line = |text: &str, i: usize| text.lines().nth(i).unwrap_or("nothing").to_owned();
        let first = (0..).find(|&i| line(&theirs, i) != line(&usual_lines, i)).unwrap_or(0);
        let (theirs, usually) = (line(&theirs, first), line(&usual_lines, first));
        let what = format!("rank {odd} has another {what} than rank {usual}: `{theirs}` instead of `{usually}`");
        Err(failed(what, "start all ranks with the same program, arguments and files"))
    }

    /// The number of elements of this rank.
    fn count(&self, counts: &[usize]) -> Result<usize> {
        let ranks = self.hsdp_shard_size();
        ensure!(counts.len() == ranks, "{} counts for {ranks} ranks", counts.len());
        Ok(counts[self.shard_rank()])
    }

    fn call(&self, op: Op, len: usize) -> Call {
        Call { op, len, step: self.step.load(Ordering::Relaxed) }
    }

    /// Runs `f` on the collective thread, or immediately if there is none.
    fn start<R: Send + 'static>(&self, f: impl FnOnce(&Wire) -> Result<R> + Send + 'static) -> Pending<R> {
        match self.background.get() {
            Some(background) => background.run(f),
            None => Pending::done(self.wire.waiting(|| f(&self.wire))),
        }
    }

    /// Every rank's `ours`, in rank order, after all earlier collectives.
    fn to_all<T: Number>(&self, op: Op, len: usize, ours: Vec<T>) -> Result<Vec<Arc<Vec<T>>>> {
        #[cfg(test)]
        self.agreements.fetch_add(1, Ordering::Relaxed);
        if let Some(background) = self.background.get() {
            background.run(|_| Ok(())).wait()?;
        }
        self.wire.waiting(|| self.wire.to_all(self.call(op, len), ours))
    }
}

#[cfg(test)]
mod tests;
