//! Ranks as threads of one process, each with its own pool of compute threads.
//!
//! All collectives use one exchange: every rank deposits its values, waits until all ranks have done so, and takes
//! references to the values of all ranks.

use super::{Group, meeting::Meeting, wire::Link};
use crate::{
    error::{Context, Error, Exit, Result, anyhow},
    report, runtime,
};
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Runs `f` on `world_size` ranks, each on a share of the compute threads; `patience` is how long a rank waits for the
/// others. Returns what each rank returned, in rank order.
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
            if meeting.failed().is_some() {
                failed.get_or_insert_with(Instant::now);
            }
        }
    });
    if let Some(Err(error)) = meeting.failed().and_then(|rank| results[rank].take()) {
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
