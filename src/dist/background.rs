//! Collectives that overlap computation: each rank has one thread that runs them in call order.

use super::Wire;
use crate::error::{Result, anyhow, failed};
use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
};

/// The result of a collective that may still be running.
#[must_use = "the result of the collective is dropped"]
pub struct Pending<T>(Box<dyn FnOnce() -> Result<T> + Send>);

impl<T: Send + 'static> Pending<T> {
    pub(super) fn done(result: Result<T>) -> Self {
        Self(Box::new(|| result))
    }

    /// Waits for the result.
    ///
    /// # Errors
    /// A rank failed or timed out.
    pub fn wait(self) -> Result<T> {
        (self.0)()
    }

    /// Applies `f` to the result, on the thread that waits.
    pub(super) fn map<R: Send + 'static>(self, f: impl FnOnce(T) -> R + Send + 'static) -> Pending<R> {
        Pending(Box::new(move || self.wait().map(f)))
    }
}

/// The thread of a rank that runs its collectives. Dropping it waits until all of them have run.
pub(super) struct Background {
    wire: Arc<Wire>,
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

type Task = Box<dyn FnOnce(&Wire) + Send>;

impl Background {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn start(wire: Arc<Wire>) -> Result<Self> {
        let (name, (tasks, queue)) = (format!("{}-collectives", wire.rank), channel::<Task>());
        let worker = wire.clone();
        let work = move || queue.into_iter().for_each(|task| task(&worker));
        let thread = thread::Builder::new().name(name).spawn(work)?;
        Ok(Self { wire, tasks: Some(tasks), thread: Some(thread) })
    }

    /// Runs `f` after all earlier tasks.
    pub fn run<R: Send + 'static>(&self, f: impl FnOnce(&Wire) -> Result<R> + Send + 'static) -> Pending<R> {
        let (sender, receiver) = channel();
        // Nobody may be waiting for the result if the rank failed after this call.
        let task: Task = Box::new(move |wire| drop(sender.send(f(wire))));
        // A task that cannot be sent is dropped together with its sender, so that the receiver gets an error.
        if let Some(tasks) = &self.tasks {
            let _ = tasks.send(task);
        }
        let wire = self.wire.clone();
        Pending(Box::new(move || wire.waiting(|| receive(&receiver, &wire))))
    }
}

/// Waits for a result of the collective thread.
///
/// # Errors
/// The thread ended or hangs. An exchange times out by itself, so a thread that neither starts nor ends one within
/// twice that time hangs somewhere else.
fn receive<R>(results: &Receiver<Result<R>>, wire: &Wire) -> Result<R> {
    let limit = wire.patience().saturating_mul(2);
    loop {
        let before = wire.progress();
        match results.recv_timeout(limit) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => return Err(anyhow!("the collective thread ended")),
            Err(RecvTimeoutError::Timeout) if wire.progress() == before => {
                let what = format!(
                    "rank {}: the collective thread has made no progress for {} s",
                    wire.rank,
                    limit.as_secs_f64()
                );
                return Err(failed(what, "the same command resumes from the newest checkpoint; please report this"));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // If a task panicked, its waiter has already got an error.
            let _ = thread.join();
        }
    }
}
