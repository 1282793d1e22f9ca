//! What a request asks of the model's thread, and what it gets back.

use super::metrics::Metrics;
use crate::generate::{Decoding, Request, Sampling};
use image::RgbImage;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Instant,
};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

/// Images of one request.
pub struct ImagesWork {
    pub requests: Vec<Request>,
    pub sampling: Sampling,
    /// Numbers of complete rows of codes after which the upper part of an image is sent.
    pub parts: Vec<usize>,
    /// Never waits for a client: the number of events is limited by the request.
    pub events: UnboundedSender<Event>,
    pub asked: Instant,
    pub deadline: Instant,
}

/// What happens to the images of a request; `image` counts them from 0.
pub enum Event {
    /// The upper part of an image; `index` counts its parts from 0.
    Part {
        image: usize,
        index: usize,
        pixels: RgbImage,
    },
    Image {
        image: usize,
        done: Done,
    },
    Failed(Failure),
}

/// A complete image.
pub struct Done {
    pub pixels: RgbImage,
    /// The probability, by the matcher, that image and prompt are a pair.
    pub matches: Option<f64>,
    /// Number of tokens of the prompt and of the image.
    pub prompt_tokens: usize,
    pub image_tokens: usize,
}

/// A work with a short answer.
pub struct TextsWork {
    pub task: TextsTask,
    pub reply: oneshot::Sender<Result<Vec<Text>, Failure>>,
    pub deadline: Instant,
}

pub enum TextsTask {
    /// Captions of an image of the image tokenizer's size.
    Captions { image: RgbImage, decoding: Decoding, count: usize },
    /// Answers to a question about such an image.
    Answers { image: RgbImage, question: String, decoding: Decoding, count: usize },
    /// The match of an image of any size with each text.
    Scores { image: RgbImage, texts: Vec<String> },
}

/// A caption, an answer or a text with its score.
pub struct Text {
    pub text: String,
    /// Of captions and answers the mean log probability of a token, of scores a probability.
    pub score: Option<f64>,
    pub cosine: Option<f64>,
    /// The probability, by the matcher, that image and caption are a pair.
    pub matches: Option<f64>,
}

/// Why a work has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Its time is over.
    TooLate,
    /// The server stops.
    Stopped,
    /// The model failed; the server's log says why.
    Broken,
}

pub enum Work {
    Images(ImagesWork),
    Texts(TextsWork),
}

/// Places in the queue, given back when dropped.
pub struct Places {
    queued: Arc<Metrics>,
    count: u64,
}

impl Places {
    /// One of the places is free again: its work has begun.
    pub fn give_back_one(&mut self) {
        if self.count > 0 {
            self.count -= 1;
            self.queued.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.queued.waiting.fetch_sub(self.count, Ordering::SeqCst);
    }
}

/// The bounded queue in front of the model's thread. An image takes a place until its first code, a text until its answer
/// is begun.
pub struct Queue {
    sender: mpsc::Sender<(Work, Places)>,
    metrics: Arc<Metrics>,
    limit: u64,
}

/// Why a work is not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum NotTaken {
    Full,
    /// The model's thread has ended.
    Ended,
}

impl Queue {
    pub fn new(limit: u64, metrics: Arc<Metrics>) -> (Self, mpsc::Receiver<(Work, Places)>) {
        let (sender, receiver) = mpsc::channel();
        (Self { sender, metrics, limit }, receiver)
    }

    /// Hands a work over without waiting.
    pub fn push(&self, work: Work) -> Result<(), NotTaken> {
        let count = match &work {
            Work::Images(work) => work.requests.len() as u64,
            Work::Texts(_) => 1,
        };
        let waiting: &AtomicU64 = &self.metrics.waiting;
        let fits = |waiting: u64| waiting.checked_add(count).filter(|&waiting| waiting <= self.limit);
        if waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits).is_err() {
            return Err(NotTaken::Full);
        }
        let places = Places { queued: self.metrics.clone(), count };
        self.sender.send((work, places)).map_err(|_| NotTaken::Ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_back() {
        let metrics = Arc::new(Metrics::default());
        let (queue, receiver) = Queue::new(3, metrics.clone());
        let work = |count| {
            let (events, now) = (tokio::sync::mpsc::unbounded_channel().0, Instant::now());
            let requests = vec![Request::default(); count];
            let sampling = Sampling::GREEDY;
            Work::Images(ImagesWork { requests, sampling, parts: Vec::new(), events, asked: now, deadline: now })
        };
        assert_eq!([4, 2, 2, 1].map(|count| queue.push(work(count)).is_ok()), [false, true, false, true]);
        let (_work, mut places) = receiver.recv().unwrap();
        (0..3).for_each(|_| places.give_back_one());
        assert_eq!(metrics.waiting.load(Ordering::SeqCst), 1);
        assert_eq!(queue.push(work(2)), Ok(()));
        drop((places, receiver));
        assert_eq!((queue.push(work(1)), metrics.waiting.load(Ordering::SeqCst)), (Err(NotTaken::Ended), 0));
    }
}
