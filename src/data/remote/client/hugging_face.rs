//! Data sets on Hugging Face, or on a mirror of it (`HF_ENDPOINT`).

use super::{client, json, variable};
use crate::{
    data::remote::{
        answer::{Entry, Failure, Limits},
        location::Location,
    },
    error::{Context, Hint, Result},
};
use reqwest::{RequestBuilder, Url};
use serde::Deserialize;

/// Maximum size of one page of a listing in bytes.
const MAX_PAGE: usize = 64 << 20;

/// An entry of a listing.
#[derive(Deserialize)]
struct Listed {
    r#type: String,
    path: String,
    #[serde(default)]
    size: u64,
    oid: Option<String>,
    lfs: Option<Lfs>,
}

/// A file that is stored with Git LFS.
#[derive(Deserialize)]
struct Lfs {
    oid: String,
}

/// The URL of a file.
///
/// # Errors
/// `HF_ENDPOINT` is not a URL.
pub fn file_url(dataset: &str, revision: &str, path: &str) -> Result<Url, Failure> {
    url(&["datasets", dataset, "resolve", revision, path])
        .ok_or_else(|| Failure::permanent("HF_ENDPOINT is not a URL", "set it to https://HOST, or unset it"))
}

/// `HF_ENDPOINT` with these paths.
fn url(paths: &[&str]) -> Option<Url> {
    let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
    let mut url = Url::parse(&endpoint).ok()?;
    let names = paths.iter().flat_map(|path| path.split('/')).filter(|name| !name.is_empty());
    url.path_segments_mut().ok()?.pop_if_empty().extend(names);
    Some(url)
}

/// The request with the token of `HF_TOKEN`. It is not sent to other hosts to which the answer redirects.
pub fn authorized(request: RequestBuilder) -> RequestBuilder {
    match variable("HF_TOKEN") {
        Some(token) => request.bearer_auth(token),
        None => request,
    }
}

/// Lists the files of a folder, with subfolders if `recursive`.
///
/// # Errors
/// The server cannot be reached, refuses the request, or its listing cannot be parsed.
pub async fn list(dataset: &str, revision: &str, path: &str, recursive: bool) -> Result<Vec<Entry>> {
    let wrong = || ("HF_ENDPOINT is not a URL", "set it to https://HOST, or unset it");
    let first = url(&["api", "datasets", dataset, "tree", revision, path]).hint(wrong().0, wrong().1)?;
    let location =
        Location::HuggingFace { dataset: dataset.to_owned(), revision: revision.to_owned(), path: path.to_owned() };
    let client = client(&Limits::default()).map_err(|failure| failure.into_error("hf:", 1))?;
    let mut next = Some(first.clone());
    if let Some(url) = &mut next {
        url.query_pairs_mut().append_pair("recursive", if recursive { "true" } else { "false" });
    }
    let mut entries = Vec::new();
    while let Some(url) = next.take() {
        // Pages of the same server only: the token goes with the request.
        if url.origin() != first.origin() {
            break;
        }
        let (body, link) = json(authorized(client.get(url)), &location, MAX_PAGE).await?;
        let listed: Vec<Listed> =
            serde_json::from_slice(&body).with_context(|| format!("the listing of {dataset} cannot be parsed"))?;
        let files = listed.into_iter().filter(|entry| entry.r#type == "file");
        entries.extend(files.map(|Listed { path, size, oid, lfs, .. }| Entry {
            path,
            size,
            version: lfs.map(|lfs| lfs.oid).or(oid),
        }));
        next = link.as_deref().and_then(next_page);
    }
    Ok(entries)
}

/// The URL of the next page in a header `link`: `<https://...>; rel="next"`.
fn next_page(link: &str) -> Option<Url> {
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    Url::parse(next.split_once('<')?.1.split_once('>')?.0).ok()
}
