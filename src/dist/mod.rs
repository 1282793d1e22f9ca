//! Ranks that train together, and what all of them call in the same order (paper §3.2).
//!
//! A [`Group`] is one rank's end. Every collective checks that all ranks called the same one with the same length; a
//! rank that fails, panics or stays away longer than the time limit makes the call an error on all others, never a hang.
//! Sums run in rank order on whoever needs them: the same bits on every rank, each time, and whatever carries them.
//! Ranks are threads of one process ([`local`]) or processes that a launcher started ([`mpi`]).

mod launcher;
mod local;
#[cfg_attr(not(feature = "mpi"), path = "mpi_disabled.rs")]
mod mpi;
#[cfg_attr(not(feature = "nccl"), path = "nccl_disabled.rs")]
mod nccl;

use crate::{
    error::{Error, Result, anyhow, ensure, failed, usage},
    ops::slices,
};
use candle_core::{Device, Tensor};
pub use launcher::{Place, place};
use local::Meeting;
pub use local::launch;
pub use mpi::STATE as MPI_STATE;
use nccl::Nccl;
use std::{
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// The `i`-th of `n` parts of `0..len`: sizes differ by one at most.
pub fn part(len: usize, i: usize, n: usize) -> Range<usize> {
    // In u128 because `len` times `n` may not fit.
    let at = |i: usize| (len as u128 * i as u128 / n.max(1) as u128) as usize;
    at(i)..at(i + 1)
}

/// The ranks of a run: who they are, before they start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranks {
    /// So many threads of this process.
    Threads(usize),
    /// This process is one of those that a launcher started.
    Processes(Place),
}

impl Ranks {
    /// `threads` ranks in this process, unless a launcher started several processes.
    ///
    /// # Errors
    /// Both are wanted, or the launcher's variables are not whole.
    pub fn find(threads: usize) -> Result<Self> {
        match place()? {
            Some(place) if place.world_size > 1 => {
                let (launcher, world_size) = (place.launcher, place.world_size);
                let what = format!("{threads} ranks are wanted in each of the {world_size} processes of {launcher}");
                ensure!(threads == 1, usage(what, "leave --nproc away, or start one process"));
                Ok(Self::Processes(place))
            }
            _ => Ok(Self::Threads(threads)),
        }
    }

    pub fn world_size(&self) -> usize {
        match self {
            Self::Threads(ranks) => *ranks,
            Self::Processes(place) => place.world_size,
        }
    }

    /// Whether this process holds the rank that speaks for all.
    pub fn leads(&self) -> bool {
        !matches!(self, Self::Processes(place) if place.rank > 0)
    }

    /// Runs `f` on every rank, each on its share of this machine's compute threads; `patience` is how long a rank waits
    /// for the others.
    ///
    /// # Errors
    /// That of the rank which failed or panicked first; the others are stopped at their next collective. Ranks that are
    /// processes leave here when one fails, with its exit code.
    pub fn run(&self, patience: Duration, f: impl Fn(&Group) -> Result<()> + Sync) -> Result<()> {
        match self {
            Self::Threads(ranks) => launch(*ranks, patience, f).map(drop),
            Self::Processes(place) => mpi::run(place, patience, f),
        }
    }
}

/// One rank's end of a group.
pub struct Group {
    rank: usize,
    world_size: usize,
    link: Link,
    /// What moves floats, where ranks have CUDA devices.
    nccl: OnceLock<(Device, Mutex<Nccl>)>,
    /// The step that messages name.
    step: AtomicU64,
}

/// What joins a rank to the others.
enum Link {
    Alone,
    Threads(Arc<Meeting>),
    #[cfg(feature = "mpi")]
    Processes(mpi::World),
}

/// Numbers that travel as they lie in memory.
pub trait Number: bytemuck::Pod + Send + Sync {}

impl<T: bytemuck::Pod + Send + Sync> Number for T {}

/// What a rank calls; all ranks must call the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Call {
    op: Op,
    /// Elements in all.
    len: usize,
    step: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Gather,
    AllGather,
    ReduceScatter,
    AllReduce,
    Sum,
    Barrier,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gather => "gather",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllReduce => "all_reduce",
            Self::Sum => "sum",
            Self::Barrier => "barrier",
        })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} elements in step {}", self.op, self.len, self.step)
    }
}

/// What to say when ranks call different things.
fn different((rank, call): (usize, Call), (other, others): (usize, Call)) -> String {
    let ((a, first), (b, second)) =
        if rank < other { ((rank, call), (other, others)) } else { ((other, others), (rank, call)) };
    format!("ranks call different collectives: rank {a} {first}, rank {b} {second}")
}

/// What to say when a rank waited too long for others, each with its last call.
fn late(patience: Duration, call: Call, missing: &[(usize, Option<Call>)]) -> Error {
    let name = |(rank, last): &(usize, Option<Call>)| match last {
        Some(last) => format!("rank {rank} (last seen at {last})"),
        None => format!("rank {rank} (never seen)"),
    };
    let (seconds, missing) = (patience.as_secs_f64(), missing.iter().map(name).collect::<Vec<_>>().join(", "));
    let hint = "a rank hangs or is too slow; raise train.rank_timeout if it only needs more time";
    failed(format!("waited {seconds} s at {call} for {missing}"), hint)
}

impl Group {
    /// The only rank.
    pub fn alone() -> Self {
        Self::new(0, 1, Link::Alone)
    }

    fn new(rank: usize, world_size: usize, link: Link) -> Self {
        Self { rank, world_size, link, nccl: OnceLock::new(), step: AtomicU64::new(0) }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Whether this rank speaks and writes for all.
    pub fn leads(&self) -> bool {
        self.rank == 0
    }

    /// The step that messages name from now on.
    pub fn begin_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Where the ranks have CUDA devices, floats go over NCCL from now on; what else ranks tell each other does not.
    ///
    /// # Errors
    /// NCCL is not built in or not there, or two ranks have the same device.
    pub fn use_device(&self, device: &Device) -> Result<()> {
        if !device.is_cuda() || self.world_size == 1 {
            return Ok(());
        }
        let exchange = |ours: Option<Vec<u8>>| Ok(self.gather(ours.unwrap_or_default())?[0].to_vec());
        let nccl = Nccl::new(device, self.rank, self.world_size, exchange)?;
        ensure!(self.nccl.set((device.clone(), Mutex::new(nccl))).is_ok(), "the group has its devices already");
        Ok(())
    }

    /// What `f` makes of `ours` on the device; `None` where floats do not go over NCCL.
    fn on_device(
        &self,
        op: Op,
        len: usize,
        ours: &[f32],
        f: impl FnOnce(&Nccl, &Tensor) -> Result<Tensor>,
    ) -> Result<Option<Vec<f32>>> {
        let Some((device, nccl)) = self.nccl.get() else { return Ok(None) };
        // NCCL waits for ever; this does not, and sees whether all ranks call the same.
        self.to_all(op, len, Vec::<u8>::new())?;
        let nccl = nccl.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Some(f(&nccl, &Tensor::from_slice(ours, ours.len(), device)?)?.to_vec1()?))
    }

    /// Every rank's values, in rank order; their lengths may differ.
    pub fn gather<T: Number>(&self, ours: Vec<T>) -> Result<Vec<Arc<Vec<T>>>> {
        self.to_all(Op::Gather, 0, ours)
    }

    /// Every rank's values, in rank order, where rank r gives `counts[r]` of them.
    pub fn all_gather(&self, ours: Vec<f32>, counts: &[usize]) -> Result<Vec<Arc<Vec<f32>>>> {
        let expected = self.count(counts)?;
        ensure!(ours.len() == expected, "all_gather: {} elements instead of {expected}", ours.len());
        let len = counts.iter().sum();
        if let Some(all) = self.on_device(Op::AllGather, len, &ours, |nccl, ours| nccl.all_gather(ours, counts))? {
            return Ok(cut(&all, counts).map(|part| Arc::new(part.to_vec())).collect());
        }
        self.to_all(Op::AllGather, len, ours)
    }

    /// The sum over all ranks of this rank's part of `all`, in which `counts[r]` elements after another are rank r's.
    pub fn reduce_scatter(&self, all: Vec<f32>, counts: &[usize]) -> Result<Vec<f32>> {
        self.count(counts)?;
        let len: usize = counts.iter().sum();
        ensure!(all.len() == len, "reduce_scatter: {} elements instead of {len}", all.len());
        let sum = self.on_device(Op::ReduceScatter, len, &all, |nccl, all| nccl.reduce_scatter(all, counts))?;
        sum.map_or_else(|| self.scatter(Op::ReduceScatter, all, counts), Ok)
    }

    /// The sum over all ranks.
    pub fn all_reduce(&self, ours: Vec<f32>) -> Result<Vec<f32>> {
        if let Some(sum) = self.on_device(Op::AllReduce, ours.len(), &ours, Nccl::all_reduce)? {
            return Ok(sum);
        }
        let counts: Vec<usize> =
            (0..self.world_size).map(|rank| part(ours.len(), rank, self.world_size).len()).collect();
        let len = ours.len();
        let sums = self.scatter(Op::AllReduce, ours, &counts)?;
        let parts = self.to_all(Op::AllReduce, len, sums)?;
        Ok(parts.iter().flat_map(|part| part.iter().copied()).collect())
    }

    /// The sum over all ranks, number by number.
    pub fn sum(&self, ours: &[f64]) -> Result<Vec<f64>> {
        let parts = self.to_all(Op::Sum, ours.len(), ours.to_vec())?;
        Ok((0..ours.len()).map(|i| parts.iter().map(|part| part[i]).sum()).collect())
    }

    /// Waits until all ranks are here.
    pub fn barrier(&self) -> Result<()> {
        self.to_all(Op::Barrier, 0, Vec::<u8>::new()).map(drop)
    }

    /// Checks that all ranks hold the same text.
    ///
    /// # Errors
    /// Names the first rank with another one.
    pub fn same(&self, what: &str, ours: &str) -> Result<()> {
        let all = self.gather(ours.as_bytes().to_vec())?;
        match all.iter().position(|text| *text != all[0]) {
            Some(rank) => Err(anyhow!("rank {rank} has another {what} than rank 0")),
            None => Ok(()),
        }
    }

    /// This rank's count.
    fn count(&self, counts: &[usize]) -> Result<usize> {
        ensure!(counts.len() == self.world_size, "{} counts for {} ranks", counts.len(), self.world_size);
        Ok(counts[self.rank])
    }

    fn call(&self, op: Op, len: usize) -> Call {
        Call { op, len, step: self.step.load(Ordering::Relaxed) }
    }

    /// Every rank's `ours`, in rank order.
    fn to_all<T: Number>(&self, op: Op, len: usize, ours: Vec<T>) -> Result<Vec<Arc<Vec<T>>>> {
        let call = self.call(op, len);
        match &self.link {
            Link::Alone => Ok(vec![Arc::new(ours)]),
            Link::Threads(meeting) => meeting.exchange(self.rank, call, ours),
            #[cfg(feature = "mpi")]
            Link::Processes(world) => {
                let everywhere = world.swap(call, &vec![ours.as_slice(); self.world_size])?;
                Ok(everywhere.into_iter().map(Arc::new).collect())
            }
        }
    }

    /// The sum, in rank order, of this rank's part of every rank's `all`.
    fn scatter(&self, op: Op, all: Vec<f32>, counts: &[usize]) -> Result<Vec<f32>> {
        let (call, start) = (self.call(op, all.len()), counts[..self.rank].iter().sum::<usize>());
        let mine = start..start + counts[self.rank];
        match &self.link {
            Link::Alone => Ok(all),
            Link::Threads(meeting) => {
                let everywhere = meeting.exchange(self.rank, call, all)?;
                Ok(sum(everywhere.iter().map(|all| &all[mine.clone()])))
            }
            #[cfg(feature = "mpi")]
            Link::Processes(world) => {
                let parts: Vec<&[f32]> = cut(&all, counts).collect();
                Ok(sum(world.swap(call, &parts)?.iter().map(Vec::as_slice)))
            }
        }
    }
}

/// Parts of these lengths, one after another.
fn cut<'a>(mut all: &'a [f32], counts: &[usize]) -> impl Iterator<Item = &'a [f32]> {
    counts.iter().filter_map(move |count| all.split_off(..*count))
}

fn sum<'a>(mut parts: impl Iterator<Item = &'a [f32]>) -> Vec<f32> {
    let mut sum = parts.next().map(<[f32]>::to_vec).unwrap_or_default();
    parts.for_each(|part| slices::add(&mut sum, part));
    sum
}

#[cfg(test)]
mod tests;
