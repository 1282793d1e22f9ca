//! A service that translates: JSON lines by HTTP POST.

use super::{
    protocol::{self, Answer, MAX_LINE, Question},
    report::{Cause, Failure},
};
use crate::error::{Result, ensure, failed, usage};
use std::{collections::HashSet, time::Duration};
use ureq::{Agent, Body, http::Response};

/// The URL of a service.
pub struct Service {
    agent: Agent,
    url: String,
}

impl Service {
    /// # Errors
    /// The URL does not begin with `http://`.
    pub fn new(url: &str, timeout: Duration) -> Result<Self> {
        let hint = "name a service like http://127.0.0.1:8000/translate; HTTPS needs a local proxy";
        let valid = url.starts_with("http://") && url.parse::<ureq::http::Uri>().is_ok();
        ensure!(valid, usage(format_args!("--url `{url}` is not an address of a service"), hint));
        let agent = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .build();
        Ok(Self { agent: agent.into(), url: url.to_owned() })
    }

    /// Sends questions and passes on the answers; `None` if all have one.
    ///
    /// # Errors
    /// The service says that such requests are never right, such as 404 Not Found.
    pub fn ask(&self, questions: &[Question<'_>], answer: &mut dyn FnMut(u64, Answer)) -> Result<Option<Failure>> {
        let lines = protocol::lines(questions)?;
        let request = self.agent.post(&self.url).header("content-type", "application/x-ndjson");
        let response = match request.send(lines.as_slice()).and_then(|response| read(response, questions.len())) {
            Ok(response) => response,
            Err(error) => return Ok(Some(self.failure(&error))),
        };
        let (status, body) = response;
        if !status.is_success() {
            let what = format!("{} answered {status}: {}", self.url, protocol::shown(body.trim_ascii()));
            let again = status.is_server_error() || [400, 408, 413, 422, 425, 429].contains(&status.as_u16());
            ensure!(again, failed(what, "check the address of the service"));
            return Ok(Some(Failure::new(Cause::HttpStatus, what)));
        }
        let mut open: HashSet<u64> = questions.iter().map(|question| question.id).collect();
        let mut bad = None;
        for line in body.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty()) {
            match protocol::parse(line) {
                // Second answers, and answers to what nobody asked, are not used.
                Some((id, text)) if open.remove(&id) => answer(id, text),
                Some(_) => {}
                None => bad = bad.or(Some(line)),
            }
        }
        let failure = match bad {
            _ if open.is_empty() => return Ok(None),
            Some(line) => Failure::new(Cause::BadAnswer, format!("{} answered {}", self.url, protocol::shown(line))),
            None => {
                let counts = format!("{} of {} texts", open.len(), questions.len());
                Failure::new(Cause::NoAnswer, format!("{} gave no answer to {counts}", self.url))
            }
        };
        Ok(Some(failure))
    }

    fn failure(&self, error: &ureq::Error) -> Failure {
        let cause = match error {
            ureq::Error::Timeout(_) => Cause::Timeout,
            _ => Cause::Connection,
        };
        Failure::new(cause, format!("{}: {error}", self.url))
    }
}

/// Status and content of a response to `questions` questions.
fn read(mut response: Response<Body>, questions: usize) -> Result<(ureq::http::StatusCode, Vec<u8>), ureq::Error> {
    let limit = MAX_LINE.saturating_mul(questions as u64 + 1);
    let body = response.body_mut().with_config().limit(limit).read_to_vec()?;
    Ok((response.status(), body))
}
