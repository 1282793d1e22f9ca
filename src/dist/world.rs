//! Ranks as processes started by a launcher, on one machine or many.
//!
//! A collective is a round of messages from every rank to every other: first a [`Header`] with the call and the number
//! of bytes that follow, then the numbers. Each rank therefore sees the calls of all others before it decides, ranks
//! that time out can be named, and a failed rank reports its failure instead of its next call. MPI's own collectives
//! offer neither, and they add in their own order; the traffic is the same. Messages go over MPI if an MPI launcher
//! started the ranks, and over [`tcp`] if the environment only names the host of rank 0.

use super::{
    call::{Call, Number, Op, different, late},
    mpi, tcp,
    wait::{Lost, Wait},
};
use crate::{
    error::{Error, Exit, Result, anyhow, ensure, exit_of, failed},
    report,
};
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// This process's connection to the other ranks.
pub struct World {
    rank: usize,
    world_size: usize,
    carrier: Mutex<Carrier>,
    /// Time limit for waiting for the other ranks.
    patience: Duration,
    /// The last call of all ranks, for error messages.
    last: Mutex<Option<Call>>,
    /// Set when the run has ended; changed only while `carrier` is locked.
    verdict: Mutex<Option<Verdict>>,
}

/// The transport between processes.
pub enum Carrier {
    Mpi(mpi::Comm),
    Tcp(tcp::Mesh),
}

/// Why there are no more collectives.
#[derive(Clone, Copy)]
enum Verdict {
    /// This rank failed and is about to notify the others.
    Own,
    /// Another rank failed; it prints the error, and this is its exit code.
    Other(Exit),
    /// The same error occurred on every rank.
    Alike,
}

/// Sent to every other rank before the data: op, elements and step of the call, number of bytes that follow.
type Header = [u64; 4];

/// Operations by the number that encodes them in a header.
const OPS: [Op; 6] = [Op::Gather, Op::AllGather, Op::ReduceScatter, Op::AllReduce, Op::Sum, Op::Barrier];
/// Instead of an op: this rank makes no more calls.
const DONE: u64 = 100;
/// Instead of an op: this rank failed; the field for elements holds the exit code.
const FAILURE: u64 = 101;

/// Time that a failed rank waits for the others to receive its failure.
const GRACE: Duration = Duration::from_secs(30);
/// Time for which a waiting rank keeps its core busy.
const EAGER: Duration = Duration::from_millis(1);

impl World {
    pub fn new((rank, world_size): (usize, usize), carrier: Carrier, patience: Duration) -> Self {
        let (carrier, last, verdict) = (Mutex::new(carrier), Mutex::default(), Mutex::default());
        Self { rank, world_size, carrier, patience, last, verdict }
    }

    /// How long a rank waits for the others.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Sends `parts[r]` to rank r and returns the message of each rank.
    pub fn swap<T: Number>(&self, call: Call, parts: &[&[T]]) -> Result<Vec<Vec<T>>> {
        let mut carrier = lock(&self.carrier);
        ensure!(lock(&self.verdict).is_none(), "the run ended before {call}");
        let parts: Vec<&[u8]> = parts.iter().map(|part| bytemuck::cast_slice(part)).collect();
        let said = |part: &&[u8]| [call.op as u64, call.len as u64, call.step, part.len() as u64];
        let headers = self.headers(&mut carrier, call, &parts.iter().map(said).collect::<Vec<_>>(), None);
        self.check(&headers)?;
        let workspace = |header: &Header| vec![T::zeroed(); header[3] as usize / size_of::<T>().max(1)];
        let mut received: Vec<Vec<T>> = headers.iter().map(workspace).collect();
        let buffers: Vec<&mut [u8]> =
            received.iter_mut().map(|workspace| bytemuck::cast_slice_mut(workspace)).collect();
        let wait = Wait { own: None, patience: self.patience, eager: Duration::MAX };
        self.exchange(&mut carrier, call, &parts, buffers, &wait);
        *lock(&self.last) = Some(call);
        Ok(received)
    }

    /// Waits until no rank has anything more to call.
    pub fn done(&self) -> Result<()> {
        let mut carrier = lock(&self.carrier);
        self.check(&self.headers(&mut carrier, self.end(), &self.to_all([DONE, 0, 0, 0]), None))
    }

    /// The call shown in error messages after the last one.
    fn end(&self) -> Call {
        Call { op: Op::Barrier, len: 0, step: lock(&self.last).map_or(0, |last| last.step) }
    }

    fn to_all(&self, header: Header) -> Vec<Header> {
        vec![header; self.world_size]
    }

    /// Exchanges headers; this rank sends `ours[r]` to rank r. `own` is the error of this rank, if it failed.
    fn headers(&self, carrier: &mut Carrier, call: Call, ours: &[Header], own: Option<&Error>) -> Vec<Header> {
        let mut theirs: Vec<Header> = vec![[0; 4]; self.world_size];
        let sent: Vec<&[u8]> = ours.iter().map(|header| bytemuck::cast_slice(header)).collect();
        let buffers = theirs.iter_mut().map(|header| bytemuck::cast_slice_mut(header)).collect();
        let patience = if own.is_some() { GRACE } else { self.patience };
        self.exchange(carrier, call, &sent, buffers, &Wait { own, patience, eager: EAGER });
        theirs
    }

    /// Checks that all ranks make the same call.
    fn check(&self, headers: &[Header]) -> Result<()> {
        let settle = |verdict| *lock(&self.verdict) = Some(verdict);
        if let Some(rank) = headers.iter().position(|header| header[0] == FAILURE) {
            settle(Verdict::Other(Exit::of_code(headers[rank][1] as usize)));
            return Err(anyhow!("rank {rank} ended the run"));
        }
        // All ranks must compare the same two headers.
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

    /// Sends `parts[r]` to rank r and fills `buffers[r]` with the message of rank r. If that fails, it ends all
    /// processes.
    fn exchange(&self, carrier: &mut Carrier, call: Call, parts: &[&[u8]], mut buffers: Vec<&mut [u8]>, wait: &Wait) {
        buffers[self.rank].copy_from_slice(parts[self.rank]);
        match carrier {
            Carrier::Mpi(comm) => comm.exchange(self.rank, parts, buffers, wait, |lost| self.tell(&lost, call, wait)),
            Carrier::Tcp(mesh) => {
                if let Err(lost) = mesh.exchange(parts, buffers, wait) {
                    // The other ranks see the connections of this process close.
                    report::leave(self.tell(&lost, call, wait));
                }
            }
        }
    }

    /// Reports why messages did not arrive; returns the exit code.
    fn tell(&self, lost: &Lost, call: Call, wait: &Wait) -> Exit {
        let error = match lost {
            Lost::Late(ranks) => {
                let last = *lock(&self.last);
                late(wait.patience, call, &ranks.iter().map(|rank| (*rank, last)).collect::<Vec<_>>())
            }
            Lost::Gone(ranks) => {
                let ranks = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
                let hint = "see their own output for the reason; the same command resumes from the newest checkpoint";
                failed(
                    format!(
                        "rank {} lost its connections at {call}: the processes of these ranks have ended: {ranks}",
                        self.rank
                    ),
                    hint,
                )
            }
        };
        report::error(wait.own.unwrap_or(&error));
        wait.own.map_or(Exit::Failed, exit_of)
    }

    /// Ends this process because of `error`, told once however many ranks have it.
    pub fn leave(&self, error: &Error, end: impl FnOnce()) -> ! {
        // What runs beside must be through: no other thread may be inside MPI when it ends.
        let mut carrier = lock(&self.carrier);
        let verdict = *lock(&self.verdict).get_or_insert(Verdict::Own);
        let (speaks, exit) = match verdict {
            Verdict::Other(exit) => (false, exit),
            Verdict::Alike => (self.rank == 0, exit_of(error)),
            Verdict::Own => {
                let exit = exit_of(error);
                let ours = self.to_all([FAILURE, exit as u64, 0, 0]);
                let headers = self.headers(&mut carrier, self.end(), &ours, Some(error));
                let all_failed = headers.iter().all(|header| header[0] == FAILURE);
                (!all_failed || self.rank == 0, exit)
            }
        };
        if speaks {
            report::error(error);
        }
        end();
        report::leave(exit)
    }
}

fn call_of(header: &Header) -> Option<Call> {
    let op = *OPS.get(header[0] as usize)?;
    Some(Call { op, len: header[1] as usize, step: header[2] })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
