//! What all requests share.

use super::{
    metrics::Metrics,
    refusal::Refusal,
    work::{Queue, Work},
};
use crate::generate::Sampling;
use std::{
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::Semaphore;

/// How the server is set up.
pub struct Settings {
    pub host: IpAddr,
    /// 0: any free port.
    pub port: u16,
    /// Further names under which clients reach the server.
    pub names: Vec<String>,
    /// What clients must send; `None`: nothing.
    pub token: Option<String>,
    /// Maximum number of images and texts that wait.
    pub queue: u64,
    /// Maximum number of images in the running batch.
    pub max_batch: usize,
    /// Maximum time of a request.
    pub time_limit: Duration,
    /// Time of the requests in progress when the server stops.
    pub grace: Duration,
}

/// What the model can do.
#[derive(Debug, Clone)]
pub struct ModelFacts {
    /// The name of the model in requests.
    pub name: String,
    /// Side of its images in pixels.
    pub image_size: u32,
    /// Rows of codes of an image.
    pub rows: usize,
    /// Maximum number of tokens of a text.
    pub max_tokens: usize,
    /// Whether it has learnt to answer questions.
    pub answers: bool,
    /// Whether there is a matcher.
    pub scores: bool,
    /// How images are sampled where a request does not say it.
    pub sampling: Sampling,
    /// Whether it is the built-in model.
    pub is_demo: bool,
}

/// Image files that are received or decoded at the same time.
const UPLOADS: usize = 32;
const DECODED: usize = 2;

pub struct App {
    pub settings: Settings,
    pub model: ModelFacts,
    pub queue: Queue,
    pub metrics: Arc<Metrics>,
    /// Digest of the token: digests are compared in constant time.
    pub token: Option<blake3::Hash>,
    pub uploads: Semaphore,
    pub decoders: Semaphore,
    /// When the server started, in seconds since 1970.
    pub started: u64,
}

impl App {
    pub fn new(settings: Settings, model: ModelFacts, queue: Queue, metrics: Arc<Metrics>) -> Self {
        let token = settings.token.as_ref().map(|token| blake3::hash(token.as_bytes()));
        let (uploads, decoders) = (Semaphore::new(UPLOADS), Semaphore::new(DECODED));
        Self { settings, model, queue, metrics, token, uploads, decoders, started: now() }
    }

    /// Hands a work to the model's thread.
    pub fn push(&self, work: Work) -> Result<(), Refusal> {
        self.queue.push(work).map_err(|not_taken| not_taken.refusal(self.seconds_to_wait()))
    }

    /// When the waiting images should be done, by the mean time of the earlier ones.
    fn seconds_to_wait(&self) -> u64 {
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed) as f64;
        let (steps, images) = (count(&self.metrics.steps), count(&self.metrics.images));
        let batch = if steps > 0.0 { count(&self.metrics.codes) / steps } else { 1.0 };
        let mean = self.metrics.image_time.mean().unwrap_or(1.0);
        let share = if images > 0.0 { mean / batch.max(1.0) } else { 0.1 };
        ((count(&self.metrics.waiting) * share / 2.0).ceil() as u64).clamp(1, 60)
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
