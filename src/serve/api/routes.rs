//! The paths of the server.

use super::{
    app::App,
    body::{MAX_IMAGE, MAX_TEXTS, as_json},
    guard, images,
    refusal::Refusal,
    texts,
};
use crate::serve::secure;
use axum::{
    Router,
    extract::{DefaultBodyLimit, Path, Request, State},
    http::header,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data: blob:; connect-src 'self'; \
                      form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// The description of the API (OpenAPI 3.1).
static OPENAPI: LazyLock<String> =
    LazyLock::new(|| include_str!("openapi.json").replace("{version}", env!("CARGO_PKG_VERSION")));

/// All paths, as they are counted.
const PATHS: [&str; 11] = [
    "/",
    "/style.css",
    "/script.js",
    "/healthz",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/images/generations",
    "/v1/captions",
    "/v1/answers",
    "/v1/scores",
];

pub fn router(app: Arc<App>) -> Router {
    let asset =
        |kind: &'static str, text: &'static str| get(move || async move { ([(header::CONTENT_TYPE, kind)], text) });
    Router::new()
        .route("/", asset("text/html; charset=utf-8", include_str!("page.html")))
        .route("/style.css", asset("text/css; charset=utf-8", include_str!("style.css")))
        .route("/script.js", asset("text/javascript; charset=utf-8", include_str!("script.js")))
        .route("/healthz", get(|| async { as_json(&json!({ "status": "ok" })) }))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(|| async { ([(header::CONTENT_TYPE, "application/json")], OPENAPI.as_str()) }))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/v1/images/generations", post(images::generate).layer(DefaultBodyLimit::max(MAX_TEXTS)))
        .route("/v1/captions", post(texts::captions))
        .route("/v1/answers", post(texts::answers))
        .route("/v1/scores", post(texts::scores))
        .fallback(|| async { Refusal::no_path() })
        .method_not_allowed_fallback(|| async { Refusal::wrong_method() })
        .layer(DefaultBodyLimit::max(MAX_IMAGE))
        .layer(middleware::from_fn_with_state(app.clone(), around))
        .with_state(app)
}

/// Checks who asks, counts responses and adds the security headers.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let counted = PATHS.into_iter().find(|known| *known == path).unwrap_or("other");
    let checked = guard::check(&app, request.method(), path, request.headers());
    let mut response = match checked {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    app.metrics.count_response(counted, response.status().as_u16());
    secure::add_headers(&mut response, POLICY);
    response
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.text()).into_response()
}

/// OpenAI's object, and what the page needs to know.
fn facts(app: &App) -> Value {
    let model = &app.model;
    json!({ "id": model.name, "object": "model", "created": app.started, "owned_by": "vilg", "image_size": model.image_size,
        "rows": model.rows, "max_tokens": model.max_tokens, "answers": model.answers, "scores": model.scores,
        "guidance": model.sampling.guidance, "temperature": model.sampling.temperature, "demo": model.is_demo })
}

async fn models(State(app): State<Arc<App>>) -> Response {
    as_json(&json!({ "object": "list", "data": [facts(&app)] }))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    images::check_model(&app, Some(&name))?;
    Ok(as_json(&facts(&app)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_of_the_api_is_described() {
        let openapi: Value = serde_json::from_str(&OPENAPI).unwrap();
        let listed: Vec<&String> = openapi["paths"].as_object().unwrap().keys().collect();
        for path in PATHS.iter().filter(|path| !["/", "/style.css", "/script.js", "/openapi.json"].contains(path)) {
            assert!(listed.iter().any(|known| known == path), "{path}");
        }
        assert_eq!(openapi["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
