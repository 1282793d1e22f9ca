//! Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave with the documented exit code.

use crate::error::{Error, Exit, Result, stopped};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    flag,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// A request to stop after the current step.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// A stop that signals of this process raise. A second Ctrl-C ends the process at once; the newest
    /// checkpoint stays valid, because a folder gets its name only when it is complete.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        let again = Arc::new(AtomicBool::new(false));
        // Handlers run in order of registration: the shutdown first, then what arms it.
        flag::register_conditional_shutdown(SIGINT, Exit::Interrupted as i32, again.clone())?;
        flag::register(SIGINT, again)?;
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            flag::register_usize(signal, stop.0.clone(), signal as usize)?;
        }
        Ok(stop)
    }

    /// The signal that came to this process; 0: none.
    pub fn signal(&self) -> i32 {
        self.0.load(Ordering::SeqCst) as i32
    }

    /// The error to leave with when `signal` came to any rank.
    pub fn error(signal: i32, step: u64) -> Option<Error> {
        let (name, exit) = match signal {
            0 => return None,
            SIGINT => ("Ctrl-C", Exit::Interrupted),
            SIGUSR1 => ("SIGUSR1", Exit::Requeue),
            _ => ("SIGTERM", Exit::Requeue),
        };
        let message = format!("stopped by {name} after step {step}; the checkpoint is written");
        Some(stopped(message, "the same command goes on from here (`--resume auto` is the default)", exit))
    }

    #[cfg(test)]
    pub fn request(&self) {
        self.0.store(SIGTERM as usize, Ordering::SeqCst);
    }
}
