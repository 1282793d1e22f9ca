//! The model's thread. It alone owns the model: images join the running batch as soon as it has fewer than `max_batch` images, texts are answered
//! between two steps.

use super::{
    metrics::{Metrics, add},
    work::{Done, Event, Failure, ImagesWork, Places, Text, TextsTask, TextsWork, Work},
};
use crate::{
    error::Result,
    generate::{Caption, Matching, Models, RunningImage, RunningImages},
    report,
};
use image::RgbImage;
use std::{
    collections::{BTreeMap, VecDeque},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, TryRecvError},
    },
    time::Instant,
};

/// What the thread works with.
pub struct Worker<'m> {
    models: &'m Models,
    matching: Option<&'m Matching>,
    /// Maximum number of images in the running batch.
    max_batch: usize,
    metrics: Arc<Metrics>,
    /// Whether what is left is given up.
    abort: Arc<AtomicBool>,
    running: RunningImages<'m>,
    /// Of each running image: its request, and its number there.
    members: BTreeMap<u64, (Rc<ImagesWork>, usize)>,
    next_id: u64,
    images: VecDeque<Waiting>,
    texts: VecDeque<(TextsWork, Places)>,
}

/// Images that wait; `begun` of them have begun.
struct Waiting {
    work: Rc<ImagesWork>,
    begun: usize,
    places: Places,
}

/// Whether anyone still wants the result, in time; says why not.
fn is_wanted(work: &ImagesWork, metrics: &Metrics, count: usize) -> bool {
    if work.events.is_closed() {
        add(&metrics.cancelled, count as u64);
        return false;
    }
    if Instant::now() >= work.deadline {
        add(&metrics.expired, count as u64);
        let _ = work.events.send(Event::Failed(Failure::TooLate));
        return false;
    }
    true
}

impl<'m> Worker<'m> {
    /// # Errors
    /// The weights cannot be packed.
    pub fn new(
        models: &'m Models,
        matching: Option<&'m Matching>,
        max_batch: usize,
        metrics: Arc<Metrics>,
        abort: Arc<AtomicBool>,
    ) -> Result<Self> {
        let running = RunningImages::new(models)?;
        let (members, images, texts) = (BTreeMap::new(), VecDeque::new(), VecDeque::new());
        Ok(Self { models, matching, max_batch, metrics, abort, running, members, next_id: 0, images, texts })
    }

    /// Works until the queue is closed and empty.
    ///
    /// # Errors
    /// The batch cannot be started again after a failure.
    pub fn run(mut self, queue: &Receiver<(Work, Places)>) -> Result<()> {
        while self.receive(queue) {
            if self.abort.load(Ordering::SeqCst) {
                self.give_up(Failure::Stopped);
                continue;
            }
            self.forget_unwanted()?;
            self.answer_one();
            self.begin();
            if let Err(error) = self.step() {
                report::error(&error);
                self.give_up(Failure::Broken);
                self.running = RunningImages::new(self.models)?;
            }
            self.metrics.running.store(self.members.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Takes what is in the queue, and waits only if there is nothing else to do. Returns whether there is work.
    fn receive(&mut self, queue: &Receiver<(Work, Places)>) -> bool {
        let nothing = self.members.is_empty() && self.images.is_empty() && self.texts.is_empty();
        if nothing {
            match queue.recv() {
                Ok(work) => self.take(work),
                Err(_) => return false,
            }
        }
        loop {
            match queue.try_recv() {
                Ok(work) => self.take(work),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn take(&mut self, (work, places): (Work, Places)) {
        match work {
            Work::Images(work) => self.images.push_back(Waiting { work: Rc::new(work), begun: 0, places }),
            Work::Texts(work) => self.texts.push_back((work, places)),
        }
    }

    /// Everything that waits or runs fails.
    fn give_up(&mut self, failure: Failure) {
        for (_, (work, _)) in std::mem::take(&mut self.members) {
            let _ = work.events.send(Event::Failed(failure));
        }
        for waiting in self.images.drain(..) {
            let _ = waiting.work.events.send(Event::Failed(failure));
        }
        for (work, _) in self.texts.drain(..) {
            let _ = work.reply.send(Err(failure));
        }
    }

    fn forget_unwanted(&mut self) -> Result<()> {
        let metrics = &self.metrics;
        self.images.retain(|waiting| is_wanted(&waiting.work, metrics, waiting.work.requests.len() - waiting.begun));
        self.members.retain(|_, (work, _)| is_wanted(work, metrics, 1));
        let members = &self.members;
        self.running.leave(|image| members.contains_key(&image.id)).map(|_| ())
    }

    /// Begins images in the order of their requests while the batch is not full.
    fn begin(&mut self) {
        while self.members.len() < self.max_batch {
            let Some(waiting) = self.images.front_mut() else { break };
            let (work, number) = (waiting.work.clone(), waiting.begun);
            waiting.begun += 1;
            waiting.places.give_back_one();
            if waiting.begun == work.requests.len() {
                self.images.pop_front();
            }
            let Some(request) = work.requests.get(number).cloned() else { continue };
            if let Err(error) = self.running.join(self.next_id, request, work.sampling) {
                // The other images go on.
                report::error(&error);
                let _ = work.events.send(Event::Failed(Failure::Broken));
                continue;
            }
            self.members.insert(self.next_id, (work, number));
            self.next_id += 1;
        }
    }

    /// One more code for each image; sends what is complete.
    fn step(&mut self) -> Result<()> {
        if self.members.is_empty() {
            return Ok(());
        }
        self.running.step()?;
        add(&self.metrics.steps, 1);
        add(&self.metrics.codes, self.members.len() as u64);
        let width = self.models.generator.grid().width;
        for image in self.running.images() {
            let Some((work, number)) = self.members.get(&image.id) else { continue };
            let (rows, rest) = (image.codes().len() / width, image.codes().len() % width);
            let index = work.parts.iter().position(|part| rest == 0 && *part == rows);
            if let Some(index) = index {
                let pixels = self.models.upper_part(image)?;
                let _ = work.events.send(Event::Part { image: *number, index, pixels });
            }
        }
        for image in self.running.leave(|_| true)? {
            let Some((work, number)) = self.members.remove(&image.id) else { continue };
            let done = self.finish(&image, work.requests.get(number).map_or("", |request| &request.prompt))?;
            add(&self.metrics.images, 1);
            self.metrics.image_time.add(work.asked.elapsed());
            let _ = work.events.send(Event::Image { image: number, done });
        }
        Ok(())
    }

    fn finish(&self, image: &RunningImage, prompt: &str) -> Result<Done> {
        let pixels = self.models.pixels(image)?;
        let matches = self.matches(&pixels, &[prompt.to_owned()])?.into_iter().next().flatten();
        Ok(Done { matches, pixels, prompt_tokens: image.prompt_tokens(), image_tokens: image.codes().len() })
    }

    /// The probability that the image and each text are a pair.
    fn matches(&self, image: &RgbImage, texts: &[String]) -> Result<Vec<Option<f64>>> {
        let Some(matching) = self.matching.filter(|matching| matching.is_calibrated() && !texts.is_empty()) else {
            return Ok(vec![None; texts.len()]);
        };
        Ok(cosines(matching, image, texts)?.into_iter().map(|cosine| matching.score(cosine)).collect())
    }

    /// Answers the text that has waited longest.
    fn answer_one(&mut self) {
        while let Some((work, mut places)) = self.texts.pop_front() {
            places.give_back_one();
            if work.reply.is_closed() {
                add(&self.metrics.cancelled, 1);
            } else if Instant::now() >= work.deadline {
                add(&self.metrics.expired, 1);
                let _ = work.reply.send(Err(Failure::TooLate));
            } else {
                let answer = self.answer(&work.task).inspect_err(report::error);
                add(&self.metrics.texts, 1);
                let _ = work.reply.send(answer.map_err(|_| Failure::Broken));
                break;
            }
        }
    }

    fn answer(&self, task: &TextsTask) -> Result<Vec<Text>> {
        match task {
            TextsTask::Captions { image, decoding, count } => {
                let codes = self.models.encode(std::slice::from_ref(image))?;
                let captions = self.models.caption(&codes, decoding, *count)?.concat();
                let texts: Vec<String> = captions.iter().map(|caption| caption.text.clone()).collect();
                let matches = self.matches(image, &texts)?;
                let text = |(caption, matches)| Text { matches, ..Text::from(caption) };
                Ok(captions.into_iter().zip(matches).map(text).collect())
            }
            TextsTask::Answers { image, question, decoding, count } => {
                let codes = self.models.encode(std::slice::from_ref(image))?;
                let answers = self.models.answer(&codes, &[question], decoding, *count)?.concat();
                Ok(answers.into_iter().map(Text::from).collect())
            }
            TextsTask::Scores { image, texts } => {
                let Some(matching) = self.matching else { return Ok(Vec::new()) };
                let score = |(text, cosine): (&String, f64)| Text {
                    text: text.clone(),
                    score: matching.score(cosine),
                    cosine: Some(cosine),
                    matches: None,
                };
                Ok(texts.iter().zip(cosines(matching, image, texts)?).map(score).collect())
            }
        }
    }
}

impl From<Caption> for Text {
    fn from(caption: Caption) -> Self {
        Self { text: caption.text, score: Some(caption.score), cosine: None, matches: None }
    }
}

/// The cosine of an image with each text.
fn cosines(matching: &Matching, image: &RgbImage, texts: &[String]) -> Result<Vec<f64>> {
    let (images, texts) = (matching.embed_images(std::slice::from_ref(image))?, matching.embed_texts(texts)?);
    Ok(Matching::cosines(&images, &texts)?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}
