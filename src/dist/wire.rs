//! A rank's connection to the others, and the two exchanges from which all collectives are built.

use super::{
    call::{Among, Call, Number},
    meeting::Meeting,
    nccl::Nccl,
    part,
    world::World,
};
use crate::{error::Result, ops::slices};
use std::{
    ops::Range,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A rank's connection to the others.
pub struct Wire {
    pub rank: usize,
    pub world_size: usize,
    pub link: Link,
    /// Number of ranks in a shard group; all ranks until it is set.
    pub hsdp_shard_size: OnceLock<usize>,
    /// Collectives between CUDA devices, if the ranks use them.
    pub nccl: OnceLock<Mutex<Nccl>>,
    /// Counter of begun and ended exchanges of this rank; see [`Wire::progress`].
    pub events: AtomicU64,
    /// Nanoseconds that the rank's own thread has waited in collectives.
    pub waited: AtomicU64,
}

/// The transport between ranks.
pub enum Link {
    Alone,
    Threads(Arc<Meeting>),
    Processes(World),
}

impl Wire {
    /// The number of ranks in a shard group.
    pub fn hsdp_shard_size(&self) -> usize {
        self.hsdp_shard_size.get().copied().unwrap_or(self.world_size)
    }

    /// Time limit for waiting for the other ranks.
    pub fn patience(&self) -> Duration {
        match &self.link {
            Link::Alone => Duration::MAX,
            Link::Threads(meeting) => meeting.patience(),
            Link::Processes(world) => world.patience(),
        }
    }

    /// A counter that increases whenever an exchange of this rank begins or ends.
    pub fn progress(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// Runs `f`, in which the rank's own thread waits for a collective, and counts the time.
    pub fn waiting<R>(&self, f: impl FnOnce() -> R) -> R {
        let begun = Instant::now();
        let result = f();
        self.waited.fetch_add(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// Runs the exchange `f` and counts it as progress.
    fn exchange<R>(&self, f: impl FnOnce() -> R) -> R {
        self.events.fetch_add(1, Ordering::Relaxed);
        let result = f();
        self.events.fetch_add(1, Ordering::Relaxed);
        result
    }

    /// The ranks of `among`, including this one, in order.
    pub fn members(&self, among: Among) -> Vec<usize> {
        let (rank, shards) = (self.rank, self.hsdp_shard_size());
        match among {
            Among::All => (0..self.world_size).collect(),
            Among::Shards => (rank - rank % shards..rank - rank % shards + shards).collect(),
            Among::Replicas => (rank % shards..self.world_size).step_by(shards).collect(),
        }
    }

    /// Every rank's `ours`, in rank order.
    pub fn to_all<T: Number>(&self, call: Call, ours: Vec<T>) -> Result<Vec<Arc<Vec<T>>>> {
        self.to_members(call, Among::All, ours)
    }

    /// The values `ours` of each of these ranks, in rank order.
    pub fn to_members<T: Number>(&self, call: Call, among: Among, ours: Vec<T>) -> Result<Vec<Arc<Vec<T>>>> {
        let members = self.members(among);
        match &self.link {
            Link::Alone => Ok(vec![Arc::new(ours)]),
            Link::Threads(meeting) => {
                let everywhere = self.exchange(|| meeting.exchange(self.rank, call, ours))?;
                Ok(members.iter().map(|&rank| everywhere[rank].clone()).collect())
            }
            Link::Processes(world) => {
                let mut parts: Vec<&[T]> = vec![&[]; self.world_size];
                members.iter().for_each(|&rank| parts[rank] = ours.as_slice());
                let mut everywhere = self.exchange(|| world.swap(call, &parts))?;
                Ok(members.iter().map(|&rank| Arc::new(std::mem::take(&mut everywhere[rank]))).collect())
            }
        }
    }

    /// This rank's part of `all` of each of these ranks, in rank order; `counts` are the lengths of the parts.
    pub fn scatter(&self, call: Call, among: Among, all: Vec<f32>, counts: &[usize]) -> Result<Vec<Part>> {
        let members = self.members(among);
        match &self.link {
            Link::Alone => Ok(vec![Part::whole(all)]),
            Link::Threads(meeting) => {
                let before = counts.iter().zip(&members).take_while(|(_, rank)| **rank < self.rank);
                let start = before.map(|(count, _)| count).sum::<usize>();
                let ours = members.iter().position(|rank| *rank == self.rank).map_or(0, |i| counts[i]);
                let everywhere = self.exchange(|| meeting.exchange(self.rank, call, all))?;
                let part = |&rank: &usize| Part { of: everywhere[rank].clone(), range: start..start + ours };
                Ok(members.iter().map(part).collect())
            }
            Link::Processes(world) => {
                let mut parts: Vec<&[f32]> = vec![&[]; self.world_size];
                members.iter().zip(cut(&all, counts)).for_each(|(&rank, part)| parts[rank] = part);
                let mut everywhere = self.exchange(|| world.swap(call, &parts))?;
                Ok(members.iter().map(|&rank| Part::whole(std::mem::take(&mut everywhere[rank]))).collect())
            }
        }
    }

    /// The sum over these ranks, on all of them.
    pub fn all_reduce(&self, call: Call, among: Among, ours: Vec<f32>) -> Result<Vec<f32>> {
        let members = self.members(among).len();
        let counts: Vec<usize> = (0..members).map(|i| part(ours.len(), i, members).len()).collect();
        let parts = self.to_members(call, among, sum(&self.scatter(call, among, ours, &counts)?))?;
        Ok(parts.iter().flat_map(|part| part.iter().copied()).collect())
    }
}

/// One rank's contribution to a sum.
pub struct Part {
    of: Arc<Vec<f32>>,
    range: Range<usize>,
}

impl Part {
    pub fn whole(values: Vec<f32>) -> Self {
        Self { range: 0..values.len(), of: Arc::new(values) }
    }
}

/// Consecutive parts of `all` with these lengths.
pub fn cut<'a>(mut all: &'a [f32], counts: &[usize]) -> impl Iterator<Item = &'a [f32]> {
    counts.iter().filter_map(move |count| all.split_off(..*count))
}

/// The sum of the parts, added in their order.
pub fn sum(parts: &[Part]) -> Vec<f32> {
    let mut parts = parts.iter().map(|part| &part.of[part.range.clone()]);
    let mut sum = parts.next().map(<[f32]>::to_vec).unwrap_or_default();
    parts.for_each(|part| add(&mut sum, part));
    sum
}

/// Adds `x` to `y`, element by element.
///
/// Only a compute thread uses its pool for this. The collective thread belongs to no pool: it would wait for the global
/// pool, whose workers may all be waiting for this sum.
fn add(y: &mut [f32], x: &[f32]) {
    match rayon::current_thread_index() {
        Some(_) => slices::add(y, x),
        None => y.iter_mut().zip(x).for_each(|(y, x)| *y += x),
    }
}
