//! Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave with the documented exit code.

use crate::error::{Error, Exit, Result, stopped};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    flag,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// A request to stop after the current step.
#[derive(Clone, Default)]
pub struct Stop {
    /// Of the signal that came; 0: none.
    signal: Arc<AtomicUsize>,
    deadline: Option<Instant>,
    /// What the longest step so far took with its checkpoint, in milliseconds.
    longest: Arc<AtomicU64>,
}

/// Stands for the time limit among the signals; greater than all of them.
const TIME_LIMIT: i32 = 1 << 10;

impl Stop {
    /// A stop that signals of this process raise. A second Ctrl-C ends the process at once; the newest
    /// checkpoint stays valid, because a folder gets its name only when it is complete.
    /// It stops as well where the next step might not end before `time_limit` is over.
    pub fn on_signals(time_limit: Option<Duration>) -> Result<Self> {
        let deadline = time_limit.and_then(|limit| Instant::now().checked_add(limit));
        let stop = Self { deadline, ..Self::default() };
        let again = Arc::new(AtomicBool::new(false));
        // Handlers run in order of registration: the shutdown first, then what arms it.
        flag::register_conditional_shutdown(SIGINT, Exit::Interrupted as i32, again.clone())?;
        flag::register(SIGINT, again)?;
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            flag::register_usize(signal, stop.signal.clone(), signal as usize)?;
        }
        Ok(stop)
    }

    /// The signal that came to this process, or [`TIME_LIMIT`]; 0: none.
    pub fn signal(&self) -> i32 {
        // Twice: the step that is under way is not over yet, and its checkpoint is not written.
        let needed = Duration::from_millis(2 * self.longest.load(Ordering::SeqCst));
        if self.deadline.is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()) <= needed) {
            return TIME_LIMIT;
        }
        self.signal.load(Ordering::SeqCst) as i32
    }

    /// A step took so long, with its checkpoint.
    pub fn took(&self, time: Duration) {
        self.longest.fetch_max(time.as_millis() as u64, Ordering::SeqCst);
    }

    /// The error to leave with when `signal` came to any rank.
    pub fn error(signal: i32, step: u64) -> Option<Error> {
        let (name, exit) = match signal {
            0 => return None,
            SIGINT => ("Ctrl-C", Exit::Interrupted),
            SIGUSR1 => ("SIGUSR1", Exit::Requeue),
            TIME_LIMIT => ("--time-limit", Exit::Requeue),
            _ => ("SIGTERM", Exit::Requeue),
        };
        let message = format!("stopped by {name} after step {step}; the checkpoint is written");
        Some(stopped(message, "the same command goes on from here (`--resume auto` is the default)", exit))
    }

    #[cfg(test)]
    pub fn request(&self) {
        self.signal.store(SIGTERM as usize, Ordering::SeqCst);
    }
}
