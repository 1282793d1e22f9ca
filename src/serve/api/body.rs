//! Bodies of requests and responses: JSON of limited size that arrives in limited time, the values and images in it, and JSON.

use super::{app::App, refusal::Refusal};
use crate::data::image::decode_within;
use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use image::RgbImage;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::time::Duration;
use tokio::time::timeout;

/// Maximum size in bytes of a body of texts, and of one with an image.
pub const MAX_TEXTS: usize = 64 << 10;
pub const MAX_IMAGE: usize = 12 << 20;
/// Maximum number of images or texts that are made for a request.
const MAX_COUNT: u32 = 16;
/// Maximum time until a body is complete.
const MAX_TIME: Duration = Duration::from_secs(20);
/// Maximum size of an image in pixels.
const MAX_PIXELS: u64 = 24_000_000;
/// Maximum number of characters of a text.
const MAX_CHARACTERS: usize = 1000;

/// Reads a body of at most `limit` bytes, as the layer `DefaultBodyLimit` has it too.
pub async fn json<T: DeserializeOwned>(request: Request, limit: usize) -> Result<T, Refusal> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
        return Err(Refusal::wrong_type());
    }
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > limit as u64) {
        return Err(Refusal::too_large(limit));
    }
    let bytes = timeout(MAX_TIME, Bytes::from_request(request, &())).await;
    let bytes =
        bytes.map_err(|_| Refusal::too_slow(MAX_TIME.as_secs()))?.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Refusal::too_large(limit),
            _ => Refusal::malformed("the body is incomplete"),
        })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Refusal::malformed(format!("the body is not what it should be: {error}")))
}

/// Checks a text: it is neither empty nor too long.
pub fn check_text(param: &'static str, text: &str) -> Result<(), Refusal> {
    if text.trim().is_empty() {
        return Err(Refusal::param(param, format!("`{param}` is empty")));
    }
    check_length(param, text)
}

/// Checks that a text is not too long.
pub fn check_length(param: &'static str, text: &str) -> Result<(), Refusal> {
    let count = text.chars().take(MAX_CHARACTERS + 1).count();
    let message = || format!("`{param}` is longer than {MAX_CHARACTERS} characters");
    if count > MAX_CHARACTERS { Err(Refusal::param(param, message())) } else { Ok(()) }
}

/// The number of images or texts that is asked for; one where a request does not say it.
pub fn count(asked: Option<u32>) -> Result<u32, Refusal> {
    let count = asked.unwrap_or(1);
    let message = || format!("`n` must be from 1 to {MAX_COUNT}");
    if (1..=MAX_COUNT).contains(&count) { Ok(count) } else { Err(Refusal::param("n", message())) }
}

/// Checks a temperature or a guidance scale.
pub fn check_scale(param: &'static str, value: f64) -> Result<(), Refusal> {
    let message = || format!("`{param}` must be from 0 to 100");
    if (0.0..=100.0).contains(&value) { Ok(()) } else { Err(Refusal::param(param, message())) }
}

/// A response of JSON.
pub fn as_json(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// Decodes an image from a data URL, or from base64 alone, in a thread that may block. `then` runs there too.
pub async fn image(
    app: &App,
    text: String,
    then: impl FnOnce(RgbImage) -> RgbImage + Send + 'static,
) -> Result<RgbImage, Refusal> {
    let wrong = |message: String| Refusal::param("image", message);
    let _place = app.decoders.acquire().await.map_err(|_| Refusal::broken())?;
    let decode = move || {
        let text = match text.strip_prefix("data:") {
            Some(url) => url.split_once(";base64,").map(|(_, text)| text).ok_or("a data URL must be in base64")?,
            None => &text,
        };
        let bytes = BASE64_STANDARD.decode(text.trim()).map_err(|_| "`image` must be a data URL, or base64")?;
        let image = decode_within(&bytes, MAX_PIXELS).map_err(|bad| format!("{} ({})", bad.cause, bad.place))?;
        Ok::<_, String>(then(image))
    };
    let decoded = tokio::task::spawn_blocking(decode).await.map_err(|_| Refusal::broken())?;
    decoded.map_err(|message| {
        wrong(format!("`image` cannot be used: {message}; PNG, JPEG, WebP, GIF, BMP and TIFF are read"))
    })
}
