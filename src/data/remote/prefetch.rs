//! Downloads shards in background threads before they are wanted.

use super::{folder::Folder, shard::RemoteShard};
use crate::report;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

/// Downloads at the same time.
const THREADS: usize = 2;

/// The threads of a cache; they end when this is dropped. A download that is in progress is resumed by the next process.
#[derive(Debug)]
pub struct Prefetch {
    folder: Arc<Folder>,
    stop: Arc<AtomicBool>,
    /// Made at first use.
    queue: Mutex<Option<Sender<RemoteShard>>>,
}

impl Prefetch {
    /// Starts no thread yet.
    pub fn new(folder: Arc<Folder>) -> Self {
        Self { folder, stop: Arc::default(), queue: Mutex::default() }
    }

    /// Adds shards at the end of the queue.
    pub fn add(&self, shards: impl IntoIterator<Item = RemoteShard>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = queue.get_or_insert_with(|| self.start());
        for shard in shards {
            // It fails only if all threads have ended.
            let _ = queue.send(shard);
        }
    }

    fn start(&self) -> Sender<RemoteShard> {
        let (sender, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..THREADS {
            let (receiver, folder, stop) = (Arc::clone(&receiver), Arc::clone(&self.folder), Arc::clone(&self.stop));
            thread::spawn(move || run(&receiver, &folder, &stop));
        }
        sender
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn run(receiver: &Mutex<Receiver<RemoteShard>>, folder: &Folder, stop: &AtomicBool) {
    loop {
        let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(shard) = next else { return };
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = folder.get(&shard, stop) {
            report::detail(format_args!("read ahead: {error:#}"));
        }
    }
}
