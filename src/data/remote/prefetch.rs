//! Background threads of a cache, which download shards before they are wanted.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

/// Downloads at the same time.
const THREADS: usize = 4;

/// A download; its argument is set when the cache is closed.
pub type Task = Box<dyn FnOnce(&AtomicBool) + Send>;

/// The threads of a cache; they end when this is dropped. A download that is in progress is resumed by the next process.
#[derive(Default)]
pub struct Prefetch {
    stop: Arc<AtomicBool>,
    /// Made at first use.
    queue: Mutex<Option<Sender<Task>>>,
}

impl std::fmt::Debug for Prefetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Prefetch")
    }
}

impl Prefetch {
    /// Adds a task at the end of the queue.
    pub fn add(&self, task: Task) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        // It fails only if all threads have ended.
        let _ = queue.get_or_insert_with(|| self.start()).send(task);
    }

    fn start(&self) -> Sender<Task> {
        let (sender, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..THREADS {
            let (receiver, stop) = (Arc::clone(&receiver), Arc::clone(&self.stop));
            thread::spawn(move || run(&receiver, &stop));
        }
        sender
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn run(receiver: &Mutex<Receiver<Task>>, stop: &AtomicBool) {
    loop {
        let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = next else { return };
        if stop.load(Ordering::Relaxed) {
            return;
        }
        task(stop);
    }
}
