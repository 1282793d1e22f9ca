//! `POST /v1/images/generations`, as OpenAI's images API has it.

use super::{
    app::{App, now},
    body::{MAX_TEXTS, as_json, check_length, check_scale, check_text, count, json},
    events::{Events, event},
    refusal::Refusal,
    work::{Done, Event, Failure, ImagesWork, Work},
};
use crate::{
    config::Schedule,
    data::image_file::png,
    generate::{Request, Sampling},
};
use axum::{
    body::Body,
    extract::{self, State},
    http::header,
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use image::{
    DynamicImage, ImageFormat, RgbImage, Rgba, RgbaImage,
    imageops::{self, FilterType},
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    io::Cursor,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::mpsc::{self, Sender, UnboundedReceiver},
    time::timeout,
};

/// Range of the side of an image in pixels.
const SIDES: std::ops::RangeInclusive<u32> = 16..=1024;
/// How often a stream says that it is still there.
const ALIVE: Duration = Duration::from_secs(5);
/// Events that wait for the client.
const EVENTS: usize = 4;

/// The body of a request. Those of OpenAI's parameters that have no meaning here are accepted and ignored.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    prompt: String,
    model: Option<String>,
    n: Option<u32>,
    size: Option<String>,
    response_format: Option<String>,
    output_format: Option<String>,
    background: Option<String>,
    stream: Option<bool>,
    partial_images: Option<usize>,
    #[serde(rename = "quality")]
    _quality: Option<Value>,
    #[serde(rename = "style")]
    _style: Option<Value>,
    #[serde(rename = "moderation")]
    _moderation: Option<Value>,
    #[serde(rename = "output_compression")]
    _output_compression: Option<Value>,
    #[serde(rename = "user")]
    _user: Option<Value>,
    // Ours.
    seed: Option<u64>,
    negative_prompt: Option<String>,
    temperature: Option<f64>,
    temperature_schedule: Option<Schedule>,
    temperature_start: Option<f64>,
    top_k: Option<usize>,
    top_p: Option<f64>,
    guidance: Option<f64>,
    guidance_schedule: Option<Schedule>,
    guidance_start: Option<f64>,
}

/// What is made of the images of a request.
#[derive(Clone)]
struct Format {
    /// Side of the images in pixels.
    side: u32,
    /// Whether `url` has the image, as a data URL.
    as_url: bool,
    first_seed: u64,
}

impl Ask {
    /// How images are sampled: as asked, else as the model's configuration says.
    fn sampling(&self, defaults: &Sampling) -> Result<Sampling, Refusal> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            temperature_schedule: self.temperature_schedule.unwrap_or(defaults.temperature_schedule),
            temperature_start: self.temperature_start.unwrap_or(defaults.temperature_start),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            guidance: self.guidance.unwrap_or(defaults.guidance),
            guidance_schedule: self.guidance_schedule.unwrap_or(defaults.guidance_schedule),
            guidance_start: self.guidance_start.unwrap_or(defaults.guidance_start),
        };
        for (param, value) in [
            ("temperature", sampling.temperature),
            ("temperature_start", sampling.temperature_start),
            ("guidance", sampling.guidance),
            ("guidance_start", sampling.guidance_start),
        ] {
            check_scale(param, value)?;
        }
        for (param, start, schedule) in [
            ("temperature_start", self.temperature_start, sampling.temperature_schedule),
            ("guidance_start", self.guidance_start, sampling.guidance_schedule),
        ] {
            if start.is_some() && schedule == Schedule::Constant {
                let message = format!("`{param}` has no effect without a schedule, such as `linear`");
                return Err(Refusal::param(param, message));
            }
        }
        if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
            return Err(Refusal::param("top_p", "`top_p` must be above 0, at most 1"));
        }
        if self.negative_prompt.is_some() && !sampling.is_guided() {
            let message = "`negative_prompt` has no effect without guidance; set `guidance` above 1";
            return Err(Refusal::param("negative_prompt", message));
        }
        Ok(sampling)
    }

    fn format(&self, app: &App) -> Result<Format, Refusal> {
        let is = |given: &Option<String>, known: &[&str]| given.as_deref().is_none_or(|given| known.contains(&given));
        if !is(&self.output_format, &["png"]) {
            return Err(Refusal::param("output_format", "`output_format` must be `png`"));
        }
        if !is(&self.background, &["auto", "opaque"]) {
            return Err(Refusal::param("background", "`background` must be `auto` or `opaque`"));
        }
        if !is(&self.response_format, &["b64_json", "url"]) {
            return Err(Refusal::param("response_format", "`response_format` must be `b64_json` or `url`"));
        }
        let side = match self.size.as_deref() {
            None | Some("auto") => app.model.image_size,
            Some(size) => side(size)?,
        };
        let first_seed = match self.seed {
            Some(seed) => seed,
            // Below 2^53: a browser keeps it exactly.
            None => getrandom::u64().map_err(|_| Refusal::broken())? >> 12,
        };
        Ok(Format { side, as_url: self.response_format.as_deref() == Some("url"), first_seed })
    }

    fn check(&self, app: &App) -> Result<u32, Refusal> {
        check_text("prompt", &self.prompt)?;
        check_length("negative_prompt", self.negative_prompt.as_deref().unwrap_or_default())?;
        check_model(app, self.model.as_deref())?;
        let count = count(self.n)?;
        if self.partial_images.is_some_and(|parts| parts > app.model.rows) {
            return Err(Refusal::param(
                "partial_images",
                format!("`partial_images` must be from 0 to {}", app.model.rows),
            ));
        }
        Ok(count)
    }
}

/// Checks the name of the model in a request.
pub fn check_model(app: &App, name: Option<&str>) -> Result<(), Refusal> {
    if name.is_none_or(|name| name == app.model.name) {
        return Ok(());
    }
    Err(Refusal::no_model(format!("there is no such model here; use `{}` or leave `model` out", app.model.name)))
}

/// `256x256` → 256
fn side(size: &str) -> Result<u32, Refusal> {
    let side = size
        .split_once('x')
        .and_then(|(width, height)| (width == height && !width.starts_with('+')).then(|| width.parse().ok())?);
    let (least, most) = (SIDES.start(), SIDES.end());
    let message = || format!("`size` must be `auto`, or a square from {least}x{least} to {most}x{most}");
    side.filter(|side| SIDES.contains(side)).ok_or_else(|| Refusal::param("size", message()))
}

/// The numbers of complete rows after which a part is sent: `count` parts, evenly spread.
fn parts(count: usize, rows: usize) -> Vec<usize> {
    let mut parts: Vec<usize> = (1..=count).map(|part| part * rows / (count + 1)).filter(|&row| row > 0).collect();
    parts.dedup();
    parts
}

pub async fn generate(State(app): State<Arc<App>>, request: extract::Request) -> Result<Response, Refusal> {
    let ask: Ask = json(request, MAX_TEXTS).await?;
    let (count, sampling, format) = (ask.check(&app)?, ask.sampling(&app.model.sampling)?, ask.format(&app)?);
    let streams = ask.stream == Some(true);
    let request = |number: u32| Request {
        negative: ask.negative_prompt.clone().unwrap_or_default(),
        ..Request::new(ask.prompt.clone(), format.first_seed.wrapping_add(number.into()))
    };
    let (events, received) = mpsc::unbounded_channel();
    let (asked, parts) =
        (Instant::now(), if streams { parts(ask.partial_images.unwrap_or(0), app.model.rows) } else { Vec::new() });
    let requests = (0..count).map(request).collect();
    let deadline = asked + app.settings.time_limit;
    app.push(Work::Images(ImagesWork { requests, sampling, parts, events, asked, deadline }))?;
    if !streams {
        return all(received, count as usize, format).await;
    }
    let (sender, receiver) = mpsc::channel(EVENTS);
    tokio::spawn(stream(received, sender, count as usize, format));
    Ok(([(header::CONTENT_TYPE, "text/event-stream")], Body::new(Events::new(receiver))).into_response())
}

/// All images in one response. If the client leaves, this future and with it the receiver are dropped: the model's thread
/// sees it.
async fn all(mut received: UnboundedReceiver<Event>, count: usize, format: Format) -> Result<Response, Refusal> {
    let mut data = vec![Value::Null; count];
    let (mut done, mut prompt_tokens, mut image_tokens) = (0, 0, 0);
    while done < count {
        match received.recv().await {
            Some(Event::Part { .. }) => {}
            Some(Event::Image { image, done: result }) => {
                prompt_tokens = result.prompt_tokens;
                image_tokens += result.image_tokens;
                let object = blocking({
                    let format = format.clone();
                    move || complete(&format, image, result)
                })
                .await?;
                data.get_mut(image).map(|place| *place = object).ok_or_else(Refusal::broken)?;
                done += 1;
            }
            Some(Event::Failed(failure)) => return Err(failure.into()),
            None => return Err(Failure::Broken.into()),
        }
    }
    let body = json!({ "created": now(), "data": data, "background": "opaque", "output_format": "png",
        "size": format.size(), "usage": usage(prompt_tokens, image_tokens) });
    Ok(as_json(&body))
}

/// The events of a stream, until the last image or until the client leaves.
async fn stream(
    mut received: UnboundedReceiver<Event>,
    sender: Sender<axum::body::Bytes>,
    count: usize,
    format: Format,
) {
    let mut done = 0;
    while done < count {
        let text = match timeout(ALIVE, received.recv()).await {
            Err(_) => Ok(": waiting\n\n".to_owned()),
            Ok(Some(Event::Part { image, index, pixels })) => {
                let format = format.clone();
                blocking(move || partial(&format, image, index, &pixels)).await
            }
            Ok(Some(Event::Image { image, done: result })) => {
                done += 1;
                let format = format.clone();
                blocking(move || completed(&format, image, result)).await
            }
            Ok(Some(Event::Failed(failure))) => Err(failure.into()),
            Ok(None) => Err(Failure::Broken.into()),
        };
        let (text, ends) = match text {
            Ok(text) => (text, false),
            Err(refusal) => (event("error", &json!({ "type": "error", "error": refusal.json() })), true),
        };
        if sender.send(text.into()).await.is_err() || ends {
            return;
        }
    }
}

/// Runs work that takes long for a thread that serves clients.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> crate::error::Result<T> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|_| Refusal::broken())?;
    done.map_err(|_| Refusal::broken())
}

impl Format {
    fn size(&self) -> String {
        format!("{0}x{0}", self.side)
    }

    fn seed(&self, image: usize) -> u64 {
        self.first_seed.wrapping_add(image as u64)
    }

    fn scaled(&self, pixels: RgbImage) -> RgbImage {
        if pixels.width() == self.side {
            return pixels;
        }
        imageops::resize(&pixels, self.side, self.side, FilterType::Lanczos3)
    }
}

/// An element of `data`.
fn complete(format: &Format, image: usize, done: Done) -> crate::error::Result<Value> {
    let encoded = BASE64_STANDARD.encode(png(&format.scaled(done.pixels))?);
    let mut object = json!({ "seed": format.seed(image), "match": done.matches });
    match format.as_url {
        true => object["url"] = json!(format!("data:image/png;base64,{encoded}")),
        false => object["b64_json"] = json!(encoded),
    }
    Ok(object)
}

fn completed(format: &Format, image: usize, done: Done) -> crate::error::Result<String> {
    let (matches, usage) = (done.matches, usage(done.prompt_tokens, done.image_tokens));
    let encoded = BASE64_STANDARD.encode(png(&format.scaled(done.pixels))?);
    let kind = "image_generation.completed";
    Ok(event(
        kind,
        &json!({ "type": kind, "b64_json": encoded, "created_at": now(), "size": format.size(),
        "quality": "auto", "background": "opaque", "output_format": "png", "usage": usage,
        "image_index": image, "seed": format.seed(image), "match": matches }),
    ))
}

/// The upper part over a transparent rest.
fn partial(format: &Format, image: usize, index: usize, part: &RgbImage) -> crate::error::Result<String> {
    let mut whole = RgbaImage::from_pixel(part.width(), part.width(), Rgba([0; 4]));
    imageops::replace(&mut whole, &DynamicImage::from(part.clone()).into_rgba8(), 0, 0);
    if whole.width() != format.side {
        whole = imageops::resize(&whole, format.side, format.side, FilterType::Triangle);
    }
    let mut bytes = Cursor::new(Vec::new());
    whole.write_to(&mut bytes, ImageFormat::Png)?;
    let kind = "image_generation.partial_image";
    Ok(event(
        kind,
        &json!({ "type": kind, "b64_json": BASE64_STANDARD.encode(bytes.into_inner()), "created_at": now(),
        "partial_image_index": index, "size": format.size(), "quality": "auto", "background": "opaque",
        "output_format": "png", "image_index": image, "seed": format.seed(image) }),
    ))
}

fn usage(prompt_tokens: usize, image_tokens: usize) -> Value {
    json!({ "input_tokens": prompt_tokens, "output_tokens": image_tokens, "total_tokens": prompt_tokens + image_tokens,
        "input_tokens_details": { "text_tokens": prompt_tokens, "image_tokens": 0 } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_evenly_spread() {
        assert_eq!((parts(0, 8), parts(3, 8)), (vec![], vec![2, 4, 6]));
        assert_eq!((parts(7, 8), parts(8, 8)), ((1..8).collect(), (1..8).collect()));
    }

    #[test]
    fn sizes_are_squares_within_limits() {
        assert_eq!(["16x16", "1024x1024"].map(|size| side(size).unwrap()), [16, 1024]);
        for wrong in ["15x15", "2048x2048", "64x65", "64", "x", "", "-64x-64", "+64x+64", "99999999999x99999999999"] {
            assert!(side(wrong).is_err(), "{wrong}");
        }
    }
}
