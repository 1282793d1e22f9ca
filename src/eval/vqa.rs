//! Accuracy of answers to questions about images (paper §4.4): exact match, for all questions and for each type.

use super::{Rate, chosen, open, plain, tell_bad};
use crate::{
    data::{Kind, Question, questions},
    error::{Result, ensure, failed},
    generate::{Decoding, Models},
    report,
};
use serde::Serialize;
use std::collections::BTreeMap;

/// Images whose questions are answered together.
const BATCH: usize = 16;

/// The shares of right answers.
#[derive(Debug, Clone, Serialize)]
pub struct Accuracy {
    #[serde(flatten)]
    pub right: Tally,
    /// The share of right answers if each question were given the most frequent answer to its text among the questions that
    /// are measured. It sees no image, but all answers.
    pub without_images: Rate,
}

/// Answers all questions about `samples` images (0: all) of `data` chosen by `seed`.
///
/// # Errors
/// The data cannot be read, no image has questions in its JSON, or the model is damaged.
pub fn run(models: &Models, data: &str, samples: usize, decoding: &Decoding, seed: u64) -> Result<Accuracy> {
    let dataset = open(data, Kind::Images(u32::try_from(models.image_tokenizer.image_size())?))?;
    let places = chosen(&dataset, samples, seed, "eval pairs");
    let (mut right, mut asked, mut read) = (Tally::default(), BTreeMap::<String, BTreeMap<String, usize>>::new(), 0);
    let mut bad = dataset.bad.clone();
    let bar = report::bar(places.len() as u64, "answering");
    for chunk in places.chunks(BATCH) {
        let (mut images, mut all) = (Vec::new(), Vec::new());
        for &(source, sample) in chunk {
            match dataset.read(source, sample) {
                Ok(record) => {
                    read += 1;
                    let found = questions(&record.meta);
                    if let Some(image) = record.image.filter(|_| !found.is_empty()) {
                        all.extend(found.into_iter().map(|question| (images.len(), question)));
                        images.push(image);
                    }
                }
                Err(error) => bad.add(error),
            }
        }
        let codes = models.encode(&images)?;
        let codes: Vec<Vec<u32>> = all.iter().map(|(image, _)| codes[*image].clone()).collect();
        let texts: Vec<&str> = all.iter().map(|(_, question)| question.question.as_str()).collect();
        let answers = models.answer(&codes, &texts, decoding, 1)?;
        for ((_, question), answers) in all.iter().zip(&answers) {
            let said = answers.first().map_or("", |answer| answer.text.as_str());
            right.add(question, said);
            *asked.entry(question.question.clone()).or_default().entry(plain(&question.answer)).or_default() += 1;
        }
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    tell_bad(data, &bad, read)?;
    let hint = "questions are in the field `questions` of a sample's JSON (docs/data.md)";
    ensure!(right.all.of > 0, failed(format_args!("no image in `{data}` has questions"), hint));
    let most_frequent = asked.values().filter_map(|answers| answers.values().max()).sum();
    let without_images = Rate::new(most_frequent, right.all.of);
    Ok(Accuracy { right, without_images })
}

/// Right answers by exact match: of all questions and, where the data says, of each type.
#[derive(Debug, Clone, Serialize)]
pub struct Tally {
    pub all: Rate,
    pub types: BTreeMap<String, Rate>,
}

impl Default for Tally {
    fn default() -> Self {
        Self { all: Rate::new(0, 0), types: BTreeMap::new() }
    }
}

impl Tally {
    /// Counts the answer `said` to a question. Case and spaces are ignored.
    pub(super) fn add(&mut self, question: &Question, said: &str) {
        let right = plain(said) == plain(&question.answer);
        let add = |rate: &mut Rate| *rate = Rate::new(rate.hits + usize::from(right), rate.of + 1);
        add(&mut self.all);
        if !question.kind.is_empty() {
            add(self.types.entry(question.kind.clone()).or_insert_with(|| Rate::new(0, 0)));
        }
    }
}
