//! Ranks as threads of one process, each with its own pool of compute threads.
//!
//! All collectives use one exchange: every rank deposits its values, waits until all ranks have done so, and takes
//! references to the values of all ranks.

use super::{Call, Group, different, late, wire::Link};
use crate::{
    error::{Context, Error, Exit, Result, anyhow},
    report, runtime,
};
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Shared state through which the ranks exchange values.
pub struct Meeting {
    world_size: usize,
    /// Time limit for waiting for the other ranks.
    patience: Duration,
    round: Mutex<Round>,
    changed: Condvar,
}

struct Round {
    /// By rank: the values of this round.
    parcels: Vec<Option<(Call, Parcel)>>,
    /// Number of ranks that have taken this round's values.
    taken: usize,
    /// By rank: the last call, for error messages.
    last: Vec<Option<Call>>,
    /// By rank: whether it has finished and makes no more calls.
    done: Vec<bool>,
    /// The rank that ended the run, and why.
    failure: Option<(usize, String)>,
}

type Parcel = Arc<dyn Any + Send + Sync>;

impl Meeting {
    fn new(world_size: usize, patience: Duration) -> Self {
        let parcels = (0..world_size).map(|_| None).collect();
        let round =
            Round { parcels, taken: 0, last: vec![None; world_size], done: vec![false; world_size], failure: None };
        Self { world_size, patience, round: Mutex::new(round), changed: Condvar::new() }
    }

    /// Time limit for waiting for the other ranks.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    fn lock(&self) -> MutexGuard<'_, Round> {
        // No thread panics while it holds the lock.
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deposits the values `ours` and returns the values of all ranks, in rank order.
    ///
    /// # Errors
    /// The ranks make different calls, or one failed or timed out.
    pub fn exchange<T: Send + Sync + 'static>(
        &self,
        rank: usize,
        call: Call,
        ours: Vec<T>,
    ) -> Result<Vec<Arc<Vec<T>>>> {
        let parcels = self.parcels(rank, call, Arc::new(ours))?;
        parcels
            .into_iter()
            .map(|parcel| parcel.downcast().ok().context("ranks exchange numbers of different types"))
            .collect()
    }

    fn parcels(&self, rank: usize, call: Call, parcel: Parcel) -> Result<Vec<Parcel>> {
        let mut round = self.lock();
        round.last[rank] = Some(call);
        // The last round is complete when all ranks have taken its values.
        round = self.wait(round, rank, call, |round| round.parcels[rank].is_none())?;
        round.parcels[rank] = Some((call, parcel));
        self.changed.notify_all();
        round = self.wait(round, rank, call, |round| round.parcels.iter().all(Option::is_some))?;
        let (calls, parcels): (Vec<Call>, Vec<Parcel>) = round.parcels.iter().flatten().cloned().unzip();
        if let Some(other) = calls.iter().position(|other| *other != call) {
            let reason = different((rank, call), (other, calls[other]));
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

    /// Waits until `ready`.
    ///
    /// # Errors
    /// Another rank failed, or the time limit is reached.
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

    /// Ends the run because ranks timed out.
    fn late(&self, round: &mut Round, rank: usize, call: Call) -> Error {
        let missing = round.parcels.iter().zip(&round.last).enumerate();
        let missing: Vec<_> =
            missing.filter(|(_, (parcel, _))| parcel.is_none()).map(|(rank, (_, last))| (rank, *last)).collect();
        let error = late(self.patience, call, &missing);
        round.failure = Some((rank, error.to_string()));
        self.changed.notify_all();
        error
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

/// Runs `f` on `world_size` ranks, each with a share of the compute threads; `patience` is the time limit for waiting
/// for other ranks. Returns the results in rank order.
///
/// # Errors
/// The error of the rank that failed or panicked first; the other ranks stop at their next collective.
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
        let group = Group::new(rank, world_size, Link::Threads(meeting.clone()));
        runtime::set_local_rank(rank);
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
        let grace = patience.clamp(MIN_GRACE, MAX_GRACE);
        loop {
            match finished.recv_timeout(POLL) {
                Ok((i, result)) => results[i] = Some(result),
                Err(RecvTimeoutError::Disconnected) => break,
                // A hanging thread cannot be ended from outside, but the process can.
                Err(RecvTimeoutError::Timeout) if failed.is_some_and(|since: Instant| since.elapsed() > grace) => {
                    results.iter().flatten().filter_map(|result| result.as_ref().err()).take(1).for_each(report::error);
                    report::leave(Exit::Failed);
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
    results.into_iter().map(|result| result.context("a rank returned no result")?).collect()
}

/// Time that ranks get to notice that one of them failed: the time limit of collectives, within these bounds.
const MIN_GRACE: Duration = Duration::from_secs(5);
const MAX_GRACE: Duration = Duration::from_secs(30);
/// Interval at which the main thread checks whether a rank has failed.
const POLL: Duration = Duration::from_millis(500);

/// The error for a rank that panicked.
pub(super) fn panicked(rank: usize, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    anyhow!("rank {rank} panicked: {}", text.unwrap_or("no message"))
}
