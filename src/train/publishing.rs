//! Writes the model folder beside training, at most one at a time: for a large model it takes minutes.

use crate::{
    error::{Result, anyhow},
    report, runtime,
};
use std::thread::{self, JoinHandle};

/// The model folder that is being written.
#[derive(Default)]
pub struct Publishing {
    running: Option<JoinHandle<Result<()>>>,
    /// The step whose model folder was written or is being written last.
    step: Option<u64>,
}

impl Publishing {
    /// Waits for the folder before, then starts to write that of `step` on a thread of its own.
    ///
    /// # Errors
    /// The folder before could not be written.
    pub fn begin(&mut self, step: u64, write: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        self.finish()?;
        // A pool of its own: the threads of the other pools may all wait for other ranks.
        self.running = Some(thread::spawn(move || runtime::with_threads(1, write)?));
        self.step = Some(step);
        Ok(())
    }

    /// The step whose model folder was begun last.
    pub fn step(&self) -> Option<u64> {
        self.step
    }

    /// Waits until nothing is being written.
    ///
    /// # Errors
    /// The folder could not be written.
    pub fn finish(&mut self) -> Result<()> {
        match self.running.take().map(JoinHandle::join) {
            Some(written) => written.map_err(|_| anyhow!("the thread that writes model folders panicked"))?,
            None => Ok(()),
        }
    }
}

/// A run that fails still writes the folder that it began.
impl Drop for Publishing {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            report::warn(format_args!("the model folder was not written: {error:#}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::bail;
    use std::{sync::mpsc::channel, time::Duration};

    #[test]
    fn folders_are_written_beside_training_and_one_after_the_other() {
        let (mut publishing, (go, wait)) = (Publishing::default(), channel());
        let (said, heard) = channel();
        let of_second = said.clone();
        // This returns although the first folder waits for `go`.
        publishing
            .begin(3, move || {
                wait.recv_timeout(Duration::from_secs(60))?;
                Ok(said.send(3)?)
            })
            .unwrap();
        assert_eq!(publishing.step(), Some(3));
        assert!(heard.try_recv().is_err());
        go.send(()).unwrap();
        publishing.begin(6, move || Ok(of_second.send(6)?)).unwrap();
        publishing.finish().unwrap();
        assert_eq!(heard.iter().collect::<Vec<_>>(), [3, 6]);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_of_the_next_call() {
        let mut publishing = Publishing::default();
        publishing.begin(1, || bail!("the disk is full")).unwrap();
        let error = publishing.begin(2, || Ok(())).unwrap_err();
        assert!(error.to_string().contains("the disk is full"), "{error}");
        assert!(publishing.finish().is_ok() && publishing.step() == Some(1));
    }
}
