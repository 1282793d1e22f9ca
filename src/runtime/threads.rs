//! The compute threads: rayon's global pool, and a pool of its own for each rank.

use super::device;
use crate::error::{Context, Result};

/// Sizes the one thread pool of the process (rayon's global one); `None`: one thread a core.
///
/// # Errors
/// The threads cannot be started.
pub fn start_threads(threads: Option<usize>) -> Result<()> {
    let builder = device::pool().num_threads(threads.unwrap_or(0)).stack_size(STACK);
    builder.build_global().context("cannot start the compute threads")
}

/// Bytes of a compute thread's stack: as much as a main thread has.
const STACK: usize = 8 << 20;

/// Runs `f` on one of the compute threads. Parallel loops then begin and end there without waking up a thread that
/// sleeps, which costs more than a small matrix product.
pub fn on_threads<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// Runs `f` on one of `threads` compute threads that are `f`'s alone: a rank's share of the machine.
///
/// # Errors
/// The threads cannot be started.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> Result<R> {
    let pool = device::pool().num_threads(threads).stack_size(STACK).build();
    Ok(pool.context("cannot start the compute threads of a rank")?.install(f))
}
