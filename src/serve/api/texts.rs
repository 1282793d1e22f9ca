//! Captions, answers and scores.

use super::{
    app::App,
    body::{self, MAX_IMAGE, as_json, check_scale, check_text, count, json},
    images::check_model,
    refusal::Refusal,
    work::{Failure, Text, TextsTask, TextsWork, Work},
};
use crate::{
    data::image::square,
    generate::{Decoding, Sampling},
};
use axum::{
    extract::{Request, State},
    response::Response,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::{sync::Arc, time::Instant};
use tokio::sync::oneshot;

/// Maximum number of texts that an image is compared with.
const MAX_TEXTS: usize = 64;
/// Maximum width of beam search.
const MAX_BEAM: u32 = 16;
/// Seconds until a place for an upload should be free.
const UPLOAD_SECONDS: u64 = 2;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaptionsAsk {
    image: String,
    model: Option<String>,
    n: Option<u32>,
    beam: Option<u32>,
    temperature: Option<f64>,
    seed: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnswersAsk {
    image: String,
    question: String,
    model: Option<String>,
    n: Option<u32>,
    beam: Option<u32>,
    temperature: Option<f64>,
    seed: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScoresAsk {
    image: String,
    texts: Vec<String>,
    model: Option<String>,
}

/// How texts are decoded, as `vilg caption` decodes them: greedily, where nothing else is asked for.
fn decoding(count: u32, beam: Option<u32>, temperature: Option<f64>, seed: Option<u64>) -> Result<Decoding, Refusal> {
    if let Some(width) = beam {
        if !(1..=MAX_BEAM).contains(&width) {
            return Err(Refusal::param("beam", format!("`beam` must be from 1 to {MAX_BEAM}")));
        }
        return Ok(Decoding::Beam { width: width.max(count) as usize, length_penalty: 1.0 });
    }
    let temperature = temperature.unwrap_or(if count == 1 { 0.0 } else { 1.0 });
    check_scale("temperature", temperature)?;
    let sampling = Sampling { temperature, ..Sampling::GREEDY };
    Ok(Decoding::Sample { sampling, seed: seed.unwrap_or(0) })
}

/// Reads a body with an image, if there is a place for it.
async fn read<T: DeserializeOwned>(app: &App, request: Request) -> Result<T, Refusal> {
    let _place = app.uploads.try_acquire().map_err(|_| Refusal::busy(UPLOAD_SECONDS))?;
    json(request, MAX_IMAGE).await
}

/// The answer of the model's thread.
async fn ask(app: &App, task: TextsTask) -> Result<Vec<Text>, Refusal> {
    let (reply, answer) = oneshot::channel();
    app.push(Work::Texts(TextsWork { task, reply, deadline: Instant::now() + app.settings.time_limit }))?;
    Ok(answer.await.map_err(|_| Failure::Broken)??)
}

fn list(data: Vec<Value>, app: &App) -> Response {
    as_json(&json!({ "object": "list", "model": app.model.name, "data": data }))
}

pub async fn captions(State(app): State<Arc<App>>, request: Request) -> Result<Response, Refusal> {
    let CaptionsAsk { image, model, n, beam, temperature, seed } = read(&app, request).await?;
    check_model(&app, model.as_deref())?;
    let (count, side) = (count(n)?, app.model.image_size);
    let decoding = decoding(count, beam, temperature, seed)?;
    let image = body::image(&app, image, move |image| square(image, side)).await?;
    let captions = ask(&app, TextsTask::Captions { image, decoding, count: count as usize }).await?;
    let object = |Text { text, score, matches, .. }| json!({ "caption": text, "score": score, "match": matches });
    Ok(list(captions.into_iter().map(object).collect(), &app))
}

pub async fn answers(State(app): State<Arc<App>>, request: Request) -> Result<Response, Refusal> {
    if !app.model.answers {
        let message = "the model has not learnt to answer questions (train.vqa_batch_size = 0)";
        return Err(Refusal::unsupported(message));
    }
    let AnswersAsk { image, question, model, n, beam, temperature, seed } = read(&app, request).await?;
    check_model(&app, model.as_deref())?;
    check_text("question", &question)?;
    let (count, side) = (count(n)?, app.model.image_size);
    let decoding = decoding(count, beam, temperature, seed)?;
    let image = body::image(&app, image, move |image| square(image, side)).await?;
    let answers = ask(&app, TextsTask::Answers { image, question, decoding, count: count as usize }).await?;
    let object = |Text { text, score, .. }| json!({ "answer": text, "score": score });
    Ok(list(answers.into_iter().map(object).collect(), &app))
}

pub async fn scores(State(app): State<Arc<App>>, request: Request) -> Result<Response, Refusal> {
    if !app.model.scores {
        return Err(Refusal::unsupported("there is no matcher; start the server with --matcher DIR"));
    }
    let ScoresAsk { image, texts, model } = read(&app, request).await?;
    check_model(&app, model.as_deref())?;
    if !(1..=MAX_TEXTS).contains(&texts.len()) {
        return Err(Refusal::param("texts", format!("`texts` must have 1 to {MAX_TEXTS} texts")));
    }
    texts.iter().try_for_each(|text| check_text("texts", text))?;
    let image = body::image(&app, image, |image| image).await?;
    let scores = ask(&app, TextsTask::Scores { image, texts }).await?;
    let object = |Text { text, score, cosine, .. }| json!({ "text": text, "score": score, "cosine": cosine });
    Ok(list(scores.into_iter().map(object).collect(), &app))
}
