//! Ranks as threads of one process, each with a pool of compute threads of its own.
//!
//! All collectives stand on one meeting: every rank lays down a parcel, waits until all have, and takes away references
//! to all of them. Sums then run in rank order on each rank, so they have the same bits everywhere and each time.

use crate::{
    error::{Context, Error, Result, anyhow, ensure, failed},
    ops::slices,
    report, runtime,
};
use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// One rank's end of a group.
pub struct Group {
    rank: usize,
    meeting: Arc<Meeting>,
    /// The step that messages name.
    step: AtomicU64,
}

struct Meeting {
    world_size: usize,
    /// How long a rank waits for the others.
    patience: Duration,
    round: Mutex<Round>,
    changed: Condvar,
}

struct Round {
    /// By rank: what was laid down in this round.
    parcels: Vec<Option<(Call, Parcel)>>,
    /// Ranks that have taken this round's parcels away.
    taken: usize,
    /// By rank: the last call, for messages.
    last: Vec<Option<Call>>,
    /// By rank: whether it is done and comes to no call any more.
    done: Vec<bool>,
    /// Why the group is over, and the rank that ended it.
    failure: Option<(usize, String)>,
}

type Parcel = Arc<dyn Any + Send + Sync>;

/// What a rank calls; all ranks must call the same.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Call {
    op: &'static str,
    /// Elements in all.
    len: usize,
    step: u64,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} elements in step {}", self.op, self.len, self.step)
    }
}

impl Group {
    /// The only rank.
    pub fn alone() -> Self {
        Self::of(0, &Arc::new(Meeting::new(1, Duration::MAX)))
    }

    fn of(rank: usize, meeting: &Arc<Meeting>) -> Self {
        Self { rank, meeting: meeting.clone(), step: AtomicU64::new(0) }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world_size(&self) -> usize {
        self.meeting.world_size
    }

    /// Whether this rank speaks and writes for all.
    pub fn leads(&self) -> bool {
        self.rank == 0
    }

    /// The step that messages name from now on.
    pub fn begin_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Every rank's values, in rank order; their lengths may differ.
    pub fn gather<T: Send + Sync + 'static>(&self, ours: Vec<T>) -> Result<Vec<Arc<Vec<T>>>> {
        self.meet("gather", 0, ours)
    }

    /// Every rank's values, in rank order, where rank r gives `counts[r]` of them.
    pub fn all_gather(&self, ours: Vec<f32>, counts: &[usize]) -> Result<Vec<Arc<Vec<f32>>>> {
        let expected = self.count(counts)?;
        ensure!(ours.len() == expected, "all_gather: {} elements instead of {expected}", ours.len());
        self.meet("all_gather", counts.iter().sum(), ours)
    }

    /// The sum over all ranks of this rank's part of `all`, in which `counts[r]` elements after another are rank r's.
    pub fn reduce_scatter(&self, all: Vec<f32>, counts: &[usize]) -> Result<Vec<f32>> {
        let (count, start) = (self.count(counts)?, counts.iter().take(self.rank).sum::<usize>());
        let len = counts.iter().sum();
        ensure!(all.len() == len, "reduce_scatter: {} elements instead of {len}", all.len());
        let parts = self.meet("reduce_scatter", len, all)?;
        Ok(sum(parts.iter().map(|part| &part[start..start + count])))
    }

    /// The sum over all ranks.
    pub fn all_reduce(&self, ours: Vec<f32>) -> Result<Vec<f32>> {
        let parts = self.meet("all_reduce", ours.len(), ours)?;
        Ok(sum(parts.iter().map(|part| part.as_slice())))
    }

    /// The sum over all ranks, number by number.
    pub fn sum(&self, ours: &[f64]) -> Result<Vec<f64>> {
        let parts = self.meet("sum", ours.len(), ours.to_vec())?;
        Ok((0..ours.len()).map(|i| parts.iter().map(|part| part[i]).sum()).collect())
    }

    /// Waits until all ranks are here.
    pub fn barrier(&self) -> Result<()> {
        self.meet("barrier", 0, Vec::<u8>::new()).map(drop)
    }

    /// Checks that all ranks hold the same text.
    ///
    /// # Errors
    /// Names the first rank with another one.
    pub fn same(&self, what: &str, ours: &str) -> Result<()> {
        let all = self.gather(vec![ours.to_owned()])?;
        match all.iter().position(|text| *text != all[0]) {
            Some(rank) => Err(anyhow!("rank {rank} has another {what} than rank 0")),
            None => Ok(()),
        }
    }

    fn count(&self, counts: &[usize]) -> Result<usize> {
        ensure!(counts.len() == self.world_size(), "{} counts for {} ranks", counts.len(), self.world_size());
        Ok(counts[self.rank])
    }

    fn meet<T: Send + Sync + 'static>(&self, op: &'static str, len: usize, ours: Vec<T>) -> Result<Vec<Arc<Vec<T>>>> {
        let ours = Arc::new(ours);
        if self.world_size() == 1 {
            return Ok(vec![ours]);
        }
        let call = Call { op, len, step: self.step.load(Ordering::Relaxed) };
        let parcels = self.meeting.exchange(self.rank, call, ours)?;
        parcels
            .into_iter()
            .map(|parcel| parcel.downcast().ok().context("ranks exchange numbers of two types"))
            .collect()
    }
}

fn sum<'a>(parts: impl Iterator<Item = &'a [f32]>) -> Vec<f32> {
    let mut parts = parts;
    let mut sum = parts.next().map(<[f32]>::to_vec).unwrap_or_default();
    parts.for_each(|part| slices::add(&mut sum, part));
    sum
}

impl Meeting {
    fn new(world_size: usize, patience: Duration) -> Self {
        let parcels = (0..world_size).map(|_| None).collect();
        let round =
            Round { parcels, taken: 0, last: vec![None; world_size], done: vec![false; world_size], failure: None };
        Self { world_size, patience, round: Mutex::new(round), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Round> {
        // Nothing panics while it holds the lock.
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lays `parcel` down and returns those of all ranks.
    fn exchange(&self, rank: usize, call: Call, parcel: Parcel) -> Result<Vec<Parcel>> {
        let mut round = self.lock();
        round.last[rank] = Some(call);
        // The last round is over when all ranks have taken its parcels.
        round = self.wait(round, rank, call, |round| round.parcels[rank].is_none())?;
        round.parcels[rank] = Some((call, parcel));
        self.changed.notify_all();
        round = self.wait(round, rank, call, |round| round.parcels.iter().all(Option::is_some))?;
        let (calls, parcels): (Vec<Call>, Vec<Parcel>) = round.parcels.iter().flatten().cloned().unzip();
        if let Some(other) = calls.iter().position(|other| *other != call) {
            let (a, b) = ((rank, call), (other, calls[other]));
            let ((a, first), (b, second)) = if rank < other { (a, b) } else { (b, a) };
            let reason = format!("ranks call different collectives: rank {a} {first}, rank {b} {second}");
            round.failure.get_or_insert((rank, reason.clone()));
            self.changed.notify_all();
            return Err(anyhow!(reason));
        }
        round.taken += 1;
        if round.taken == self.world_size {
            round.taken = 0;
            round.parcels.fill_with(|| None);
            self.changed.notify_all();
        }
        Ok(parcels)
    }

    /// Waits until `ready`, the group is over, or patience is.
    fn wait<'a>(
        &'a self,
        mut round: MutexGuard<'a, Round>,
        rank: usize,
        call: Call,
        ready: impl Fn(&Round) -> bool,
    ) -> Result<MutexGuard<'a, Round>> {
        let begun = Instant::now();
        loop {
            if let Some((first, reason)) = &round.failure {
                return Err(anyhow!("rank {first} ended the run: {reason}"));
            }
            if ready(&round) {
                return Ok(round);
            }
            if let Some(gone) = (0..self.world_size).find(|i| round.done[*i] && round.parcels[*i].is_none()) {
                let reason = format!("rank {gone} is done, but rank {rank} waits for it at {call}");
                round.failure = Some((rank, reason.clone()));
                self.changed.notify_all();
                return Err(anyhow!(reason));
            }
            let Some(left) = self.patience.checked_sub(begun.elapsed()) else {
                return Err(self.late(&mut round, rank, call));
            };
            round = self.changed.wait_timeout(round, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the group because ranks stayed away.
    fn late(&self, round: &mut Round, rank: usize, call: Call) -> Error {
        let missing = round.parcels.iter().enumerate().filter(|(_, parcel)| parcel.is_none());
        let missing: Vec<String> = missing
            .map(|(rank, _)| match &round.last[rank] {
                Some(last) => format!("rank {rank} (last seen at {last})"),
                None => format!("rank {rank} (never seen)"),
            })
            .collect();
        let (seconds, missing) = (self.patience.as_secs_f64(), missing.join(", "));
        let reason = format!("waited {seconds} s at {call} for {missing}");
        round.failure = Some((rank, reason.clone()));
        self.changed.notify_all();
        failed(reason, "a rank hangs or is too slow; raise train.rank_timeout if it only needs more time")
    }

    fn done(&self, rank: usize) {
        self.lock().done[rank] = true;
        self.changed.notify_all();
    }

    fn abort(&self, rank: usize, reason: String) {
        let mut round = self.lock();
        round.failure.get_or_insert((rank, reason));
        self.changed.notify_all();
    }
}

/// Runs `f` on `world_size` ranks, each on a share of the compute threads; `patience` is how long a rank waits for the
/// others. Returns what each rank returned, in rank order.
///
/// # Errors
/// That of the rank which failed or panicked first; the others are stopped at their next collective.
pub fn launch<R: Send>(
    world_size: usize,
    patience: Duration,
    f: impl Fn(&Group) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if world_size == 1 {
        return Ok(vec![f(&Group::alone())?]);
    }
    let meeting = Arc::new(Meeting::new(world_size, patience));
    let threads = (rayon::current_num_threads() / world_size).max(1);
    let rank = |rank: usize| {
        let group = Group::of(rank, &meeting);
        let run = || runtime::with_threads(threads, || f(&group)).and_then(|result| result);
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panicked(rank, &*panic)));
        match &result {
            Ok(_) => meeting.done(rank),
            Err(error) => meeting.abort(rank, format!("{error:#}")),
        }
        result
    };
    let (sender, finished) = channel();
    let mut results: Vec<Option<Result<R>>> = (0..world_size).map(|_| None).collect();
    thread::scope(|scope| {
        for i in 0..world_size {
            let (rank, sender) = (&rank, sender.clone());
            scope.spawn(move || sender.send((i, rank(i))));
        }
        drop(sender);
        let mut failed = None;
        loop {
            match finished.recv_timeout(GRACE) {
                Ok((i, result)) => results[i] = Some(result),
                Err(RecvTimeoutError::Disconnected) => break,
                // A thread that hangs cannot be ended from outside; the process can.
                Err(RecvTimeoutError::Timeout) if failed.is_some_and(|since: Instant| since.elapsed() > GRACE) => {
                    report::give_up(results.iter().flatten().find_map(|result| result.as_ref().err()));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if meeting.lock().failure.is_some() {
                failed.get_or_insert_with(Instant::now);
            }
        }
    });
    let first = meeting.lock().failure.as_ref().map(|(rank, _)| *rank);
    if let Some(Err(error)) = first.and_then(|rank| results[rank].take()) {
        return Err(error);
    }
    results.into_iter().map(|result| result.context("a rank ended without a result")?).collect()
}

/// How long ranks may take to notice that the group is over.
const GRACE: Duration = Duration::from_secs(30);

fn panicked(rank: usize, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    anyhow!("rank {rank} panicked: {}", text.unwrap_or("no message"))
}
