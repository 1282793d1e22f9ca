//! Headers of all responses: nothing is loaded from elsewhere, framed or kept.

use axum::{
    http::{HeaderName, HeaderValue},
    response::Response,
};

const HEADERS: [(&str, &str); 5] = [
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    // A token in a link must not travel to other sites, nor stay in a cache.
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-store"),
];

/// Adds the headers; `policy` is the content security policy.
pub fn add_headers(response: &mut Response, policy: &'static str) {
    let policy = ("content-security-policy", policy);
    for (name, value) in HEADERS.into_iter().chain([policy]) {
        response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
}
