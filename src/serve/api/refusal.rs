//! Errors as OpenAI's API sends them: `{"error": {"message", "type", "param", "code"}}`.

use super::work::{Failure, NotTaken};
use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

/// Why a request is refused.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    code: Option<&'static str>,
    param: Option<&'static str>,
    message: String,
    /// After how many seconds the client may try again.
    retry_after: Option<u64>,
}

impl Refusal {
    fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into(), retry_after: None }
    }

    /// A wrong value of a parameter.
    pub fn param(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message) }
    }

    /// A request that is not understood.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, None, message)
    }

    /// What the model cannot do.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Some("unsupported_by_model"), message)
    }

    pub fn no_model(message: impl Into<String>) -> Self {
        Self { param: Some("model"), ..Self::new(StatusCode::NOT_FOUND, Some("model_not_found"), message) }
    }

    pub fn no_path() -> Self {
        Self::new(StatusCode::NOT_FOUND, None, "there is nothing at this path; /openapi.json lists the paths")
    }

    pub fn wrong_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, None, "this path does not take this method; see /openapi.json")
    }

    pub fn no_token() -> Self {
        let message = "the bearer token is missing or wrong; send the header `Authorization: Bearer TOKEN`";
        Self::new(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
    }

    /// Sent by a page of another site.
    pub fn foreign(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, Some("foreign_origin"), message)
    }

    pub fn wrong_type() -> Self {
        let message = "the body must be JSON, with the header `Content-Type: application/json`";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, message)
    }

    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {} KiB", limit >> 10);
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message)
    }

    pub fn too_slow(seconds: u64) -> Self {
        let message = format!("the body did not arrive within {seconds} seconds");
        Self::new(StatusCode::REQUEST_TIMEOUT, Some("body_too_slow"), message)
    }

    /// Too many requests; `seconds` until one of them is done.
    pub fn busy(seconds: u64) -> Self {
        let message = format!("too many requests are waiting; try again in {seconds} seconds");
        let refusal = Self::new(StatusCode::TOO_MANY_REQUESTS, Some("queue_full"), message);
        Self { retry_after: Some(seconds), ..refusal }
    }

    pub fn broken() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, None, "the model failed; the log of the server says why")
    }

    /// The error object.
    pub fn json(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "message": self.message, "type": kind, "param": self.param, "code": self.code })
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let unavailable = |code, message: &str| Self::new(StatusCode::SERVICE_UNAVAILABLE, Some(code), message);
        match failure {
            Failure::TooLate => unavailable("timeout", "the request took longer than the server allows (--time-limit)"),
            Failure::Stopped => unavailable("stopped", "the server was stopped"),
            Failure::Broken => Self::broken(),
        }
    }
}

impl NotTaken {
    /// The refusal, where a place in the queue should be free in `seconds`.
    pub fn refusal(self, seconds: u64) -> Refusal {
        match self {
            Self::Full => Refusal::busy(seconds),
            Self::Ended => Refusal::broken(),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = json!({ "error": self.json() }).to_string();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
