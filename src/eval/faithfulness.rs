//! Faithfulness of generated images to their captions, by questions (TIFA, arXiv 2303.11897): a VQA model, which
//! answers questions about images, is asked about each generated image what its caption says.

use super::{chosen, open, plain, tell_bad, vqa::Tally};
use crate::{
    data::{Kind, Question, Record, questions, resize_bicubic},
    error::{Result, ensure, failed},
    generate::{BestOf, Decoding, Models, Request, Sampling},
    report,
};
use image::RgbImage;
use serde::Serialize;

/// Captions whose images are generated together.
const BATCH: usize = 16;

/// The images to generate.
pub struct Settings<'a> {
    pub data: &'a str,
    /// Number of samples to measure; 0: all.
    pub samples: usize,
    pub sampling: Sampling,
    pub best_of: BestOf<'a>,
    pub seed: u64,
}

/// The shares of right answers.
#[derive(Debug, Serialize)]
pub struct Faithfulness {
    /// About the generated images.
    pub generated: Tally,
    /// About the real images of the same captions: the VQA model's own accuracy, which bounds the other.
    pub real: Tally,
}

/// A caption, its real image in the size of the VQA model, and the questions that the caption answers.
struct Query {
    caption: String,
    image: RgbImage,
    questions: Vec<Question>,
}

impl Query {
    /// `None` if the caption answers no question.
    fn new(record: Record) -> Option<Self> {
        let said = plain(&record.caption);
        let questions: Vec<Question> =
            questions(&record.meta).into_iter().filter(|question| said.contains(&plain(&question.answer))).collect();
        let image = record.image.filter(|_| !questions.is_empty())?;
        Some(Self { caption: record.caption, image, questions })
    }
}

/// Generates an image of each of `samples` captions chosen by the seed, and asks `vqa` those questions of the sample whose
/// answer is in the caption.
///
/// # Errors
/// The data cannot be read, no caption answers a question, or a model is damaged.
pub fn run(models: &Models, vqa: &Models, settings: &Settings) -> Result<Faithfulness> {
    let side = u32::try_from(vqa.image_tokenizer.image_size())?;
    let dataset = open(settings.data, Kind::Pairs(side))?;
    let places = chosen(&dataset, settings.samples, settings.seed, "eval pairs");
    let mut result = Faithfulness { generated: Tally::default(), real: Tally::default() };
    let mut seeds = (0..).map(|image| settings.seed.wrapping_add(image));
    let (mut read, mut bad) = (0, dataset.bad.clone());
    let bar = report::bar(places.len() as u64, "generating and asking");
    for chunk in places.chunks(BATCH) {
        let mut queries = Vec::new();
        for &(source, sample) in chunk {
            match dataset.read(source, sample) {
                Ok(record) => {
                    read += 1;
                    queries.extend(Query::new(record));
                }
                Err(error) => bad.add(error),
            }
        }
        let requests: Vec<Request> =
            queries.iter().zip(&mut seeds).map(|(query, seed)| Request::new(query.caption.as_str(), seed)).collect();
        let generated = models.generate_images(&requests, &settings.sampling, &settings.best_of, |_| {})?;
        let generated = generated.iter().map(|generated| resize_bicubic(&generated.image, side, side)).collect();
        ask(vqa, &queries, generated, &mut result.generated)?;
        let real = queries.iter().map(|query| query.image.clone()).collect();
        ask(vqa, &queries, real, &mut result.real)?;
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    tell_bad(settings.data, &bad, read)?;
    let hint = "questions are in the field `questions` of a sample's JSON (docs/data.md)";
    let none = format_args!("no caption in `{}` contains the answer to a question about its image", settings.data);
    ensure!(result.real.all.of > 0, failed(none, hint));
    Ok(result)
}

/// Asks all questions of each query about its image in `images`.
fn ask(vqa: &Models, queries: &[Query], images: Vec<RgbImage>, tally: &mut Tally) -> Result<()> {
    let codes = vqa.encode(&images)?;
    let asked: Vec<(&Vec<u32>, &Question)> = codes
        .iter()
        .zip(queries)
        .flat_map(|(codes, query)| query.questions.iter().map(move |question| (codes, question)))
        .collect();
    let codes: Vec<Vec<u32>> = asked.iter().map(|(codes, _)| (*codes).clone()).collect();
    let texts: Vec<&str> = asked.iter().map(|(_, question)| question.question.as_str()).collect();
    let greedy = Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 };
    for ((_, question), answers) in asked.iter().zip(vqa.answer(&codes, &texts, &greedy, 1)?) {
        tally.add(question, answers.first().map_or("", |answer| answer.text.as_str()));
    }
    Ok(())
}
