//! Ctrl-C, SIGTERM, SIGHUP and SIGUSR1: finish the step, save, leave with the documented exit code.

use crate::{
    error::{Error, Exit, Result, failed, stopped},
    report, runtime,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1},
    flag,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// A request to stop after the current step.
#[derive(Clone, Default)]
pub struct Stop {
    /// The number of the signal that came; 0: none.
    signal: Arc<AtomicUsize>,
    deadline: Option<Instant>,
    /// What the longest step so far took with its checkpoint, in milliseconds.
    longest: Arc<AtomicU64>,
    /// Whether the ranks have agreed to stop and write their last checkpoint.
    heard: Arc<AtomicBool>,
}

/// Stands for the time limit; greater than all signal numbers.
const TIME_LIMIT: i32 = 1 << 10;

impl Stop {
    /// A request that signals to this process raise, or the time limit: when the next step might not end before
    /// `time_limit`. A second Ctrl-C ends the process at once; the newest checkpoint stays valid, because a folder gets its
    /// name only when it is complete.
    ///
    /// # Errors
    /// The system refuses a signal handler.
    pub fn on_signals(time_limit: Option<Duration>) -> Result<Self> {
        let deadline = time_limit.and_then(|limit| Instant::now().checked_add(limit));
        let stop = Self { deadline, ..Self::default() };
        let again = Arc::new(AtomicBool::new(false));
        // Handlers run in order of registration: the shutdown first, then what arms it.
        flag::register_conditional_shutdown(SIGINT, Exit::Interrupted as i32, again.clone())?;
        flag::register(SIGINT, again)?;
        // `nohup` has SIGHUP ignored, so that a run outlives its terminal.
        let hangup = (!runtime::is_ignored(SIGHUP)).then_some(SIGHUP);
        for signal in [SIGINT, SIGTERM, SIGUSR1].into_iter().chain(hangup) {
            flag::register_usize(signal, stop.signal.clone(), signal as usize)?;
        }
        Ok(stop)
    }

    /// The signal that came to this process, or [`TIME_LIMIT`]; 0: none.
    pub fn signal(&self) -> i32 {
        // Twice: the current step must still end, and write its checkpoint.
        let needed = Duration::from_millis(2 * self.longest.load(Ordering::SeqCst));
        if self.deadline.is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()) <= needed) {
            return TIME_LIMIT;
        }
        self.signal.load(Ordering::SeqCst) as i32
    }

    /// The ranks have agreed to stop: what remains is the last checkpoint, which may take as long as it needs.
    pub fn heard(&self) {
        self.heard.store(true, Ordering::SeqCst);
    }

    /// Starts the watchdog: where the ranks do not agree to stop within `patience` of a signal (or four times the longest
    /// step, if that is longer), it ends the process. It is a thread of its own, so that it works even if all compute
    /// threads hang. It ends when the result is dropped.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn watch(&self, patience: Duration) -> Result<Watchdog> {
        let (stop, (sender, ended)) = (self.clone(), channel::<()>());
        let work = move || {
            let mut since: Option<Instant> = None;
            while ended.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) && !stop.heard.load(Ordering::SeqCst) {
                let signal = stop.signal();
                if signal == 0 {
                    continue;
                }
                let waited = since.get_or_insert_with(Instant::now).elapsed();
                let longest = Duration::from_millis(stop.longest.load(Ordering::SeqCst));
                if waited > patience.max(4 * longest) {
                    report::error(&stuck(signal, waited));
                    report::leave(if signal == SIGINT { Exit::Interrupted } else { Exit::Failed });
                }
            }
        };
        thread::Builder::new().name("watchdog".to_owned()).spawn(work)?;
        Ok(Watchdog { _running: sender })
    }

    /// A step with its checkpoint took `time`.
    pub fn took(&self, time: Duration) {
        self.longest.fetch_max(time.as_millis() as u64, Ordering::SeqCst);
    }

    /// The error to leave with when `signal` came to any rank.
    pub fn error(signal: i32, step: u64) -> Option<Error> {
        let exit = match signal {
            0 => return None,
            SIGINT => Exit::Interrupted,
            _ => Exit::Requeue,
        };
        let message = format!("stopped by {} after step {step}; the checkpoint is written", name(signal));
        Some(stopped(message, "the same command goes on from here (`--resume auto` is the default)", exit))
    }

    #[cfg(test)]
    pub fn request(&self) {
        self.signal.store(SIGTERM as usize, Ordering::SeqCst);
    }
}

/// A running watchdog; see [`Stop::watch`].
pub struct Watchdog {
    _running: Sender<()>,
}

/// How often the watchdog looks for a signal.
const POLL: Duration = Duration::from_millis(200);

fn stuck(signal: i32, waited: Duration) -> Error {
    let what = format!("{} came {} s ago, and the step does not end: a rank hangs", name(signal), waited.as_secs());
    let hint = "no checkpoint was written; the same command resumes from the newest one. Steps that need more time need \
                a larger train.rank_timeout";
    failed(what, hint)
}

fn name(signal: i32) -> &'static str {
    match signal {
        SIGINT => "Ctrl-C",
        SIGHUP => "SIGHUP",
        SIGUSR1 => "SIGUSR1",
        TIME_LIMIT => "--time-limit",
        _ => "SIGTERM",
    }
}
