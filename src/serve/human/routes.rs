//! The paths of the raters' pages.

use super::{
    answers::{self, Answers},
    pages::{self, Shown},
    texts::Both,
};
use crate::{
    error::{Error, Hint, Result},
    eval::human::{kind::Kind, order::Page, study::Study, summary},
    report,
    serve::secure,
};
use axum::{
    Router,
    extract::{DefaultBodyLimit, Path, Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Maximum size of a form in bytes.
const MAX_FORM: usize = 16 << 10;
/// Maximum time of a request, including that of its body.
const MAX_TIME: Duration = Duration::from_secs(30);

const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; form-action 'self'; \
                      base-uri 'none'; frame-ancestors 'none'";

/// What all requests share.
pub struct App {
    study: Mutex<Study>,
    kind: Kind,
    title: String,
    /// Number and digest of the token of each rater: digests are compared in constant time.
    raters: Vec<(i64, blake3::Hash)>,
}

impl App {
    pub fn new(study: Study) -> Self {
        let raters = study.raters.iter().map(|rater| (rater.number, blake3::hash(rater.token.as_bytes()))).collect();
        Self { kind: study.kind, title: study.title.clone(), raters, study: Mutex::new(study) }
    }

    fn study(&self) -> MutexGuard<'_, Study> {
        // A panic in another request has left no half-written transaction: SQLite rolls those back.
        self.study.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn end_serving(&self) {
        self.study().end_serving();
    }

    fn rater(&self, token: &str) -> Result<i64, Refusal> {
        let digest = blake3::hash(token.as_bytes());
        let found = self.raters.iter().filter(|(_, known)| *known == digest).map(|(rater, _)| *rater).next();
        found.ok_or(Refusal::WrongToken)
    }
}

/// Why a request gets no page.
pub enum Refusal {
    WrongToken,
    NotFound,
    WrongForm,
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

const LINK: Both = ("请使用发给您的完整链接。", "Please use the whole link that was sent to you.");

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, message, more): (_, Both, Both) = match self {
            Self::WrongToken => (StatusCode::FORBIDDEN, ("链接无效", "This link is not valid"), LINK),
            Self::NotFound => (StatusCode::NOT_FOUND, ("没有这个页面", "There is no such page"), LINK),
            Self::WrongForm => (
                StatusCode::BAD_REQUEST,
                ("表单无效，未保存", "The form is not valid; nothing was saved"),
                ("请返回并重试。", "Please go back and try again."),
            ),
            Self::Failed(error) => {
                report::error(&error);
                (
                    StatusCode::INTERNAL_SERVER_ERROR,
                    ("出错了，未保存", "Something went wrong; nothing was saved"),
                    ("请告诉研究的组织者，然后重试。", "Please tell the organizer of the study, then try again."),
                )
            }
        };
        page(status, pages::message(message, more))
    }
}

fn page(status: StatusCode, html: String) -> Response {
    (status, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response()
}

fn see_other(path: String) -> Response {
    (StatusCode::SEE_OTHER, [(header::LOCATION, path)]).into_response()
}

pub fn router(app: Arc<App>) -> Router {
    let asset =
        |kind: &'static str, text: &'static str| get(move || async move { ([(header::CONTENT_TYPE, kind)], text) });
    Router::new()
        .route("/", get(|| async { page(StatusCode::OK, pages::message(("评测", "Evaluation"), LINK)) }))
        .route("/style.css", asset("text/css; charset=utf-8", include_str!("style.css")))
        .route("/script.js", asset("text/javascript; charset=utf-8", include_str!("script.js")))
        .route("/r/{token}", get(overview))
        .route("/r/{token}/{page}", get(show).post(submit))
        .route("/r/{token}/{page}/{place}", get(image))
        .fallback(|| async { Refusal::NotFound })
        .layer(DefaultBodyLimit::max(MAX_FORM))
        .layer(middleware::from_fn(guard))
        .with_state(app)
}

/// Limits the time of a request and adds the security headers.
async fn guard(request: Request, next: Next) -> Response {
    let answered = tokio::time::timeout(MAX_TIME, next.run(request)).await;
    let mut response = answered.unwrap_or_else(|_| StatusCode::REQUEST_TIMEOUT.into_response());
    secure::add_headers(&mut response, POLICY);
    response
}

/// Runs work on the study in a thread that may block.
async fn on_study<T: Send + 'static>(
    app: Arc<App>,
    work: impl FnOnce(&App, &mut Study) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let work = move || {
        let mut study = app.study();
        work(&app, &mut study)
    };
    tokio::task::spawn_blocking(work).await.map_err(|_| crate::error::anyhow!("a request panicked"))?
}

async fn overview(State(app): State<Arc<App>>, Path(token): Path<String>) -> Result<Response, Refusal> {
    on_study(app, move |app, study| {
        let rater = app.rater(&token)?;
        let progress = summary::progress(study, rater)?;
        let next = next_page(study, rater, 0)?;
        Ok(page(StatusCode::OK, pages::overview(app.kind, &app.title, &token, &progress, next)))
    })
    .await
}

/// The number of the first page after page `after` that is not finished, else of the first one at all.
fn next_page(study: &Study, rater: i64, after: usize) -> Result<Option<usize>> {
    let rated = study.rated(rater)?;
    let pages = study.pages(rater);
    let open: Vec<usize> =
        (1..).zip(&pages).filter(|(_, page)| !page.outputs.iter().all(|o| rated.contains(o))).map(|(n, _)| n).collect();
    Ok(open.iter().find(|number| **number > after).or(open.first()).copied())
}

/// A page of a rater by its number in the path.
fn find(study: &Study, rater: i64, number: &str) -> Result<(usize, Page), Refusal> {
    let number: usize = number.parse().map_err(|_| Refusal::NotFound)?;
    let index = number.checked_sub(1).ok_or(Refusal::NotFound)?;
    study.pages(rater).into_iter().nth(index).map(|page| (number, page)).ok_or(Refusal::NotFound)
}

/// The stored answers of a rater about the outputs of a page.
fn stored(study: &Study, rater: i64, page: &Page) -> Result<Answers> {
    let mut answers = Answers::new();
    for (place, output) in page.outputs.iter().enumerate() {
        for (name, value) in study.answers(rater, *output)? {
            answers.extend(study.kind.question(&name).map(|question| ((place, question.name), value)));
        }
    }
    Ok(answers)
}

fn render(
    app: &App,
    study: &Study,
    rater: i64,
    token: &str,
    found: &(usize, Page),
    answers: &Answers,
    incomplete: bool,
) -> Result<String> {
    let (number, page) = found;
    let texts = page.outputs.iter().map(|output| Ok(study.output(*output)?.text)).collect::<Result<_>>()?;
    let shown = Shown {
        kind: app.kind,
        title: &app.title,
        token,
        number: *number,
        progress: summary::progress(study, rater)?,
        prompt: &study.item(page.item)?.prompt,
        texts,
        answers,
        incomplete,
    };
    Ok(pages::rating(&shown))
}

async fn show(State(app): State<Arc<App>>, Path((token, number)): Path<(String, String)>) -> Result<Response, Refusal> {
    on_study(app, move |app, study| {
        let rater = app.rater(&token)?;
        let found = find(study, rater, &number)?;
        let answers = stored(study, rater, &found.1)?;
        Ok(page(StatusCode::OK, render(app, study, rater, &token, &found, &answers, false)?))
    })
    .await
}

async fn submit(
    State(app): State<Arc<App>>,
    Path((token, number)): Path<(String, String)>,
    form: String,
) -> Result<Response, Refusal> {
    on_study(app, move |app, study| {
        let rater = app.rater(&token)?;
        let found = find(study, rater, &number)?;
        let outputs = &found.1.outputs;
        let answers = answers::parse(app.kind, outputs.len(), &form).ok_or(Refusal::WrongForm)?;
        if !answers::is_complete(app.kind, outputs.len(), &answers) {
            let html = render(app, study, rater, &token, &found, &answers, true)?;
            return Ok(page(StatusCode::UNPROCESSABLE_ENTITY, html));
        }
        let rated =
            answers.iter().filter_map(|((place, question), value)| Some((*outputs.get(*place)?, *question, *value)));
        study.rate(rater, &rated.collect::<Vec<_>>()).hint("ratings of a page cannot be saved", "is the disk full?")?;
        Ok(see_other(match next_page(study, rater, found.0)? {
            Some(next) => format!("/r/{token}/{next}"),
            None => format!("/r/{token}"),
        }))
    })
    .await
}

/// The image of an output, or with `image` that of the item.
async fn image(
    State(app): State<Arc<App>>,
    Path((token, number, place)): Path<(String, String, String)>,
) -> Result<Response, Refusal> {
    on_study(app, move |app, study| {
        let rater = app.rater(&token)?;
        let (_, page) = find(study, rater, &number)?;
        let stored = match place.as_str() {
            "image" => study.item(page.item)?.image,
            place => {
                let place: usize = place.parse().map_err(|_| Refusal::NotFound)?;
                study.output(*page.outputs.get(place).ok_or(Refusal::NotFound)?)?.image
            }
        };
        let png = study.image(stored.ok_or(Refusal::NotFound)?)?;
        Ok(([(header::CONTENT_TYPE, "image/png")], png).into_response())
    })
    .await
}
