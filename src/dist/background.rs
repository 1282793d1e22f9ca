//! Collectives beside computation: a thread of each rank does them one after another, in the order of the calls.

use super::Wire;
use crate::error::{Context, Result};
use std::{
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread::{self, JoinHandle},
};

/// What a collective gives, once it is through.
#[must_use = "all ranks do the collective, but this one loses what it gives"]
pub struct Pending<T>(Box<dyn FnOnce() -> Result<T> + Send>);

impl<T: Send + 'static> Pending<T> {
    pub(super) fn done(result: Result<T>) -> Self {
        Self(Box::new(|| result))
    }

    /// Waits until it is through.
    pub fn wait(self) -> Result<T> {
        (self.0)()
    }

    /// `f` runs on the thread that waits.
    pub(super) fn map<R: Send + 'static>(self, f: impl FnOnce(T) -> R + Send + 'static) -> Pending<R> {
        Pending(Box::new(move || self.wait().map(f)))
    }
}

/// A rank's thread of collectives; it ends after the last of them when this is dropped.
pub(super) struct Background {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce(&Wire) + Send>;

impl Background {
    /// # Errors
    /// The system gives no thread.
    pub fn start(wire: Arc<Wire>) -> Result<Self> {
        let (name, (jobs, queue)) = (format!("{}-collectives", wire.rank), channel::<Job>());
        let work = move || queue.into_iter().for_each(|job| job(&wire));
        let thread = thread::Builder::new().name(name).spawn(work)?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Does `f` when everything before it is through.
    pub fn run<R: Send + 'static>(&self, f: impl FnOnce(&Wire) -> Result<R> + Send + 'static) -> Pending<R> {
        let (sender, receiver) = channel();
        // Nobody waits for what a rank called before it failed.
        let job: Job = Box::new(move |wire| drop(sender.send(f(wire))));
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        Pending(Box::new(move || receiver.recv().ok().filter(|_| sent).context("the thread of collectives ended")?))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Its panics have reached those who wait as errors.
            let _ = thread.join();
        }
    }
}
