//! Compute threads: rayon's global pool, and a separate pool for each rank.

use super::{device, facts::field};
use crate::error::{Context, Result};

/// Starts the global thread pool of the process; `None`: one thread per core.
///
/// # Errors
/// The threads cannot be started.
pub fn start_threads(threads: Option<usize>) -> Result<()> {
    let builder = device::pool().num_threads(threads.unwrap_or(0)).stack_size(STACK);
    builder.build_global().context("cannot start the compute threads")
}

/// Stack size of a compute thread in bytes, as large as a main thread's.
const STACK: usize = 8 << 20;

/// Runs `f` on a compute thread. Parallel loops then start and end on that thread. Waking up a sleeping thread would
/// cost more than a small matrix product.
pub fn on_threads<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// The processors that this process may use, as Linux lists them (`0-3,8`); empty where the system does not tell.
pub fn allowed_processors() -> String {
    field("/proc/self/status", "Cpus_allowed_list").unwrap_or_default()
}

/// Runs `f` on a separate pool of `threads` compute threads: a rank's share of the machine.
///
/// # Errors
/// The threads cannot be started.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> Result<R> {
    let pool = device::pool().num_threads(threads).stack_size(STACK).build();
    Ok(pool.context("cannot start the compute threads of a rank")?.install(f))
}
