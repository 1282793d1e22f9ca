//! The exchange between ranks that are threads: every rank deposits a parcel, waits until all ranks have, and takes
//! references to all parcels.

use super::call::{Call, different, late};
use crate::error::{Context, Error, Result, anyhow};
use std::{
    any::Any,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Where the ranks exchange their parcels.
pub struct Meeting {
    world_size: usize,
    /// How long a rank waits for the others.
    patience: Duration,
    round: Mutex<Round>,
    changed: Condvar,
}

struct Round {
    /// By rank: the parcel of this round.
    parcels: Vec<Option<(Call, Parcel)>>,
    /// Number of ranks that have taken this round's parcels.
    taken: usize,
    /// By rank: the last call, for messages.
    last: Vec<Option<Call>>,
    /// By rank: whether it has finished and makes no more calls.
    done: Vec<bool>,
    /// The rank that ended the run, and why.
    failure: Option<(usize, String)>,
}

type Parcel = Arc<dyn Any + Send + Sync>;

impl Meeting {
    pub fn new(world_size: usize, patience: Duration) -> Self {
        let parcels = (0..world_size).map(|_| None).collect();
        let round =
            Round { parcels, taken: 0, last: vec![None; world_size], done: vec![false; world_size], failure: None };
        Self { world_size, patience, round: Mutex::new(round), changed: Condvar::new() }
    }

    /// How long a rank waits for the others.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    fn lock(&self) -> MutexGuard<'_, Round> {
        // Nothing panics while it holds the lock.
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deposits `ours` and returns the values of all ranks, in rank order.
    ///
    /// # Errors
    /// The ranks make different calls, one failed, or one did not come in time.
    pub fn exchange<T: Send + Sync + 'static>(
        &self,
        rank: usize,
        call: Call,
        ours: Vec<T>,
    ) -> Result<Vec<Arc<Vec<T>>>> {
        let parcels = self.parcels(rank, call, Arc::new(ours))?;
        parcels
            .into_iter()
            .map(|parcel| parcel.downcast().ok().context("ranks exchange numbers of two types"))
            .collect()
    }

    fn parcels(&self, rank: usize, call: Call, parcel: Parcel) -> Result<Vec<Parcel>> {
        let mut round = self.lock();
        round.last[rank] = Some(call);
        // The last round is over when all ranks have taken its parcels.
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

    /// Waits until `ready`; it is an error if a rank fails or the time limit passes before.
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

    /// Ends the run because ranks did not come.
    fn late(&self, round: &mut Round, rank: usize, call: Call) -> Error {
        let missing = round.parcels.iter().zip(&round.last).enumerate();
        let missing: Vec<_> =
            missing.filter(|(_, (parcel, _))| parcel.is_none()).map(|(rank, (_, last))| (rank, *last)).collect();
        let error = late(self.patience, call, &missing);
        round.failure = Some((rank, error.to_string()));
        self.changed.notify_all();
        error
    }

    /// The rank has finished and makes no more calls.
    pub fn done(&self, rank: usize) {
        self.lock().done[rank] = true;
        self.changed.notify_all();
    }

    /// The rank failed for this reason.
    pub fn abort(&self, rank: usize, reason: String) {
        let mut round = self.lock();
        round.failure.get_or_insert((rank, reason));
        self.changed.notify_all();
    }

    /// The rank that ended the run, if one did.
    pub fn failed(&self) -> Option<usize> {
        self.lock().failure.as_ref().map(|(rank, _)| *rank)
    }
}
