//! Requests over the network. `client_disabled.rs` replaces it in builds without the feature `remote`.

mod hugging_face;
mod s3;

use super::{
    answer::{Answer, Body, Entry, Failure, Limits, Wanted},
    location::{Location, Service},
};
use crate::error::{Context, Result};
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderName, IF_NONE_MATCH, IF_RANGE, RANGE, RETRY_AFTER},
};
use std::{
    collections::HashMap,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};
use tokio::runtime::Runtime;

/// Threads that drive connections; the transfers themselves run on the threads that read them.
const THREADS: usize = 2;
/// Maximum number of redirects of a request.
const REDIRECTS: usize = 10;

/// Opens a file.
///
/// # Errors
/// The server cannot be reached or refuses the request.
pub fn open(location: &Location, wanted: &Wanted<'_>, limits: &Limits) -> Result<Answer, Failure> {
    let url = match location {
        Location::S3 { service, bucket, key } => wait(s3::signed_url(*service, bucket, key))?,
        Location::HuggingFace { dataset, revision, path } => hugging_face::file_url(dataset, revision, path)?,
        Location::Http { url } => {
            Url::parse(url).map_err(|e| Failure::permanent(format_args!("is not a URL: {e}"), "check its spelling"))?
        }
        Location::Pipe { .. } => return Err(Failure::permanent("is a command", "")),
    };
    let mut request = client(limits)?.get(url);
    if let Location::HuggingFace { .. } = location {
        request = hugging_face::authorized(request);
    }
    if let Some(etag) = wanted.etag.filter(|_| wanted.start > 0) {
        request = request.header(RANGE, format!("bytes={}-", wanted.start)).header(IF_RANGE, etag);
    } else if let Some(etag) = wanted.known {
        request = request.header(IF_NONE_MATCH, etag);
    }
    let response = wait(async { request.send().await.map_err(|e| broken(&e)) })?;
    answer(response, location, wanted)
}

/// Lists the files of a folder; `levels`: how many levels of folders, `None`: all.
///
/// # Errors
/// The server cannot be reached, refuses the request, or has no such folder.
pub fn list(folder: &Location, levels: Option<usize>) -> Result<Vec<Entry>> {
    match folder {
        Location::S3 { service, bucket, key } => wait(s3::list(*service, bucket, key, levels)),
        Location::HuggingFace { dataset, revision, path } => {
            wait(hugging_face::list(dataset, revision, path, levels != Some(1)))
        }
        Location::Http { .. } | Location::Pipe { .. } => Ok(Vec::new()),
    }
}

/// Waits on this thread for a network operation.
fn wait<T, E: From<Failure>>(operation: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    static RUNTIME: OnceLock<std::io::Result<Runtime>> = OnceLock::new();
    let start = || tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build();
    match RUNTIME.get_or_init(start) {
        Ok(runtime) => runtime.block_on(operation),
        Err(e) => Err(Failure::permanent(format_args!("cannot start threads: {e}"), "raise `ulimit -u`").into()),
    }
}

/// The client of all requests with the same time limits.
fn client(limits: &Limits) -> Result<Client, Failure> {
    static CLIENTS: Mutex<Option<HashMap<(Duration, Duration), Client>>> = Mutex::new(None);
    let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    let clients = clients.get_or_insert_default();
    let key = (limits.connect, limits.stall);
    if let Some(client) = clients.get(&key) {
        return Ok(client.clone());
    }
    choose_tls();
    let builder = Client::builder()
        .user_agent(concat!("vilg/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::limited(REDIRECTS))
        .connect_timeout(limits.connect)
        .read_timeout(limits.stall);
    let built = builder.build();
    let client = built.map_err(|e| Failure::permanent(reason(&e), "check the certificates of this machine"))?;
    clients.insert(key, client.clone());
    Ok(client)
}

/// Chooses ring as the cryptography of TLS, once.
fn choose_tls() {
    // It fails if it is chosen already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A failure to send a request or to read its answer.
fn broken(error: &reqwest::Error) -> Failure {
    if error.is_builder() || error.is_redirect() {
        return Failure::permanent(reason(error), "check the spelling of the URL");
    }
    Failure::temporary(reason(error))
}

/// The innermost cause; the outer ones would show the URL with its query.
fn reason(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return if error.is_connect() { "no connection in time" } else { "the server sent nothing in time" }.to_owned();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let what = if error.is_connect() { "cannot connect" } else { "the connection failed" };
    // Without an inner cause, the error itself names the URL.
    if std::ptr::addr_eq(cause, error) { what.to_owned() } else { format!("{what}: {cause}") }
}

fn answer(response: Response, location: &Location, wanted: &Wanted<'_>) -> Result<Answer, Failure> {
    let (status, headers) = (response.status(), response.headers());
    let etag = header(headers, ETAG).map(str::to_owned);
    let (start, size) = match status {
        StatusCode::PARTIAL_CONTENT => {
            let range = header(headers, CONTENT_RANGE).and_then(range);
            match range {
                Some((start, size)) if start == wanted.start && etag.as_deref() == wanted.etag => (start, size),
                _ => return Ok(Answer::Changed),
            }
        }
        StatusCode::NOT_MODIFIED if wanted.known.is_some() => return Ok(Answer::NotModified),
        StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PRECONDITION_FAILED if wanted.start > 0 => {
            return Ok(Answer::Changed);
        }
        StatusCode::OK => (0, response.content_length()),
        _ => return Err(refusal(status, headers, location)),
    };
    let mut response = response;
    let read = move |buffer: &mut Vec<u8>| {
        buffer.clear();
        let chunk = wait(async { response.chunk().await.map_err(|e| broken(&e)) })?;
        if let Some(chunk) = &chunk {
            buffer.extend_from_slice(chunk);
        }
        Ok(chunk.is_some())
    };
    Ok(Answer::Body(Body { start, size, etag, read: Box::new(read) }))
}

fn header(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// First byte and size of the file in `bytes 100-199/200` or `bytes 100-199/*`.
fn range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, size.parse().ok()))
}

/// The failure of a request that the server refused.
fn refusal(status: StatusCode, headers: &HeaderMap, location: &Location) -> Failure {
    let said = format!("the server answered {status}");
    let temporary = status.is_server_error()
        || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY].contains(&status);
    if temporary {
        let after = header(headers, RETRY_AFTER).and_then(|text| text.parse().ok()).map(Duration::from_secs);
        return Failure { after, ..Failure::temporary(said) };
    }
    let hint = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => credentials(location),
        StatusCode::NOT_FOUND | StatusCode::GONE => "check the spelling of the URL",
        status if status.is_redirection() => "check the region: AWS_REGION, or OSS_ENDPOINT",
        _ => credentials(location),
    };
    Failure::permanent(said, hint)
}

/// What to set where a server refuses access.
fn credentials(location: &Location) -> &'static str {
    match location {
        Location::S3 { service, .. } => s3_credentials(*service),
        Location::HuggingFace { .. } => "set HF_TOKEN, and accept the terms of the data set on its page",
        Location::Http { .. } | Location::Pipe { .. } => {
            "the URL may need a fresh signature, or https://USER:PASSWORD@HOST"
        }
    }
}

fn s3_credentials(service: Service) -> &'static str {
    match service {
        Service::S3 => {
            "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION; for other servers AWS_ENDPOINT_URL; for public \
             buckets AWS_SKIP_SIGNATURE=true"
        }
        Service::Oss => "set OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET, and OSS_ENDPOINT or OSS_REGION",
    }
}

/// The value of an environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Asks a server for JSON of at most `limit` bytes; also returns its header `link`.
async fn json(
    request: reqwest::RequestBuilder,
    location: &Location,
    limit: usize,
) -> Result<(Vec<u8>, Option<String>)> {
    let fail = |failure: Failure| failure.into_error(&format!("{} (listing)", location_shown(location)), 1);
    let mut response = request.send().await.map_err(|e| fail(broken(&e)))?;
    if !response.status().is_success() {
        return Err(fail(refusal(response.status(), response.headers(), location)));
    }
    let link = header(response.headers(), reqwest::header::LINK).map(str::to_owned);
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| fail(broken(&e)))? {
        body.extend_from_slice(&chunk);
        (body.len() <= limit).then_some(()).with_context(|| format!("a listing of more than {limit} bytes"))?;
    }
    Ok((body, link))
}

fn location_shown(location: &Location) -> String {
    match location {
        Location::S3 { service: Service::S3, bucket, key } => format!("s3://{bucket}/{key}"),
        Location::S3 { service: Service::Oss, bucket, key } => format!("oss://{bucket}/{key}"),
        Location::HuggingFace { dataset, path, .. } => format!("hf://datasets/{dataset}/{path}"),
        Location::Http { url } => super::location::shown(url),
        Location::Pipe { command } => super::location::shown(&format!("pipe:{command}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_parsed() {
        assert_eq!(range("bytes 100-199/200"), Some((100, Some(200))));
        assert_eq!(range("bytes 100-199/*"), Some((100, None)));
        assert_eq!(range("bytes */200"), None);
        assert_eq!(range("lines 1-2/3"), None);
    }
}
