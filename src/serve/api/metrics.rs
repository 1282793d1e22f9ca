//! Counts and times, as Prometheus reads them (text format 0.0.4).

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Upper ends of the buckets of times, in seconds.
const BUCKETS: [f64; 11] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Everything that is counted since the server started.
#[derive(Default)]
pub struct Metrics {
    /// Images and texts in the queue.
    pub waiting: AtomicU64,
    /// Images that are being generated.
    pub running: AtomicU64,
    /// Complete images, and codes of all images.
    pub images: AtomicU64,
    pub codes: AtomicU64,
    /// Captions, answers and comparisons.
    pub texts: AtomicU64,
    /// Steps of the running batch.
    pub steps: AtomicU64,
    /// Images and texts that were given up because their client left, or because their time was over.
    pub cancelled: AtomicU64,
    pub expired: AtomicU64,
    /// From the request to the complete image.
    pub image_time: Histogram,
    /// By path and status.
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
}

/// Times by bucket.
#[derive(Default)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS.len() + 1],
    microseconds: AtomicU64,
}

impl Histogram {
    pub fn add(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = BUCKETS.iter().position(|end| seconds <= *end).unwrap_or(BUCKETS.len());
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.microseconds.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// The mean in seconds; `None`: there is none yet.
    pub fn mean(&self) -> Option<f64> {
        let count: u64 = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        (count > 0).then(|| self.microseconds.load(Ordering::Relaxed) as f64 / 1e6 / count as f64)
    }

    fn write(&self, text: &mut String, name: &str) {
        let mut sum = 0;
        for (i, count) in self.counts.iter().enumerate() {
            sum += count.load(Ordering::Relaxed);
            let end = BUCKETS.get(i).map_or("+Inf".to_owned(), f64::to_string);
            let _ = writeln!(text, "{name}_bucket{{le=\"{end}\"}} {sum}");
        }
        let seconds = self.microseconds.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(text, "{name}_sum {seconds}\n{name}_count {sum}");
    }
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Metrics {
    pub fn count_response(&self, path: &'static str, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        *responses.entry((path, status)).or_default() += 1;
    }

    /// The page of metrics.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let head = |text: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        for (name, kind, value, help) in [
            ("vilg_queue_length", "gauge", &self.waiting, "Images and texts that wait."),
            ("vilg_running_images", "gauge", &self.running, "Images that are being generated."),
            ("vilg_images_total", "counter", &self.images, "Complete images."),
            ("vilg_codes_total", "counter", &self.codes, "Codes of images."),
            ("vilg_steps_total", "counter", &self.steps, "Steps of the running batch."),
            ("vilg_texts_total", "counter", &self.texts, "Captions, answers and comparisons."),
            ("vilg_cancelled_total", "counter", &self.cancelled, "Given up because the client left."),
            ("vilg_expired_total", "counter", &self.expired, "Given up because the time was over."),
        ] {
            head(&mut text, name, kind, help);
            let _ = writeln!(text, "{name} {}", value.load(Ordering::Relaxed));
        }
        head(&mut text, "vilg_responses_total", "counter", "Responses by path and status.");
        for ((path, status), count) in self.responses.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = writeln!(text, "vilg_responses_total{{path=\"{path}\",status=\"{status}\"}} {count}");
        }
        head(&mut text, "vilg_image_seconds", "histogram", "From the request to the complete image.");
        self.image_time.write(&mut text, "vilg_image_seconds");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buckets_of_a_histogram_add_up() {
        let metrics = Metrics::default();
        [0.01, 0.25, 0.3, 500.0].iter().for_each(|s| metrics.image_time.add(Duration::from_secs_f64(*s)));
        metrics.count_response("/healthz", 200);
        metrics.count_response("/healthz", 200);
        let text = metrics.text();
        for line in [
            "vilg_image_seconds_bucket{le=\"0.05\"} 1",
            "vilg_image_seconds_bucket{le=\"0.25\"} 2",
            "vilg_image_seconds_bucket{le=\"0.5\"} 3",
            "vilg_image_seconds_bucket{le=\"120\"} 3",
            "vilg_image_seconds_bucket{le=\"+Inf\"} 4",
            "vilg_image_seconds_sum 500.56",
            "vilg_image_seconds_count 4",
            "vilg_responses_total{path=\"/healthz\",status=\"200\"} 2",
            "vilg_queue_length 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
