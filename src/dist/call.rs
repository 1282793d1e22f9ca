//! What ranks agree on before they exchange numbers: the collective, its length, the step, and who takes part.

use crate::error::{Error, failed};
use std::{fmt, time::Duration};

/// Numbers that are sent as their bytes in memory.
pub trait Number: bytemuck::Pod + Send + Sync {}

impl<T: bytemuck::Pod + Send + Sync> Number for T {}

/// The ranks that take part in an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Among {
    All,
    /// The ranks of this rank's shard group.
    Shards,
    /// This rank, and the ranks that own the same part in the other shard groups.
    Replicas,
}

/// A collective that a rank calls; all ranks must call the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    pub op: Op,
    /// Number of elements.
    pub len: usize,
    pub step: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
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

/// The message when ranks call different collectives.
pub fn different((rank, call): (usize, Call), (other, others): (usize, Call)) -> String {
    let ((a, first), (b, second)) =
        if rank < other { ((rank, call), (other, others)) } else { ((other, others), (rank, call)) };
    format!("ranks call different collectives: rank {a} {first}, rank {b} {second}")
}

/// The error when a rank waited too long for others, each given with its last call.
pub fn late(patience: Duration, call: Call, missing: &[(usize, Option<Call>)]) -> Error {
    let name = |(rank, last): &(usize, Option<Call>)| match last {
        Some(last) => format!("rank {rank} (last seen at {last})"),
        None => format!("rank {rank} (never seen)"),
    };
    let (seconds, missing) = (patience.as_secs_f64(), missing.iter().map(name).collect::<Vec<_>>().join(", "));
    let hint = "a rank hangs or is too slow; raise train.rank_timeout if it only needs more time";
    failed(format!("waited {seconds} s at {call} for {missing}"), hint)
}
