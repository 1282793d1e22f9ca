//! Who may ask: the names of the server, pages of other sites, and the token.
//!
//! A page of another site can make a browser send requests here. It cannot read the answers, since no header allows it, but
//! the requests would take time; and with a name that it owns and points to 127.0.0.1 (DNS rebinding) it could read them. So
//! the `Host` must be an address or a known name, and the `Origin`, where there is one, must be the host.

use super::{app::App, refusal::Refusal};
use axum::http::{HeaderMap, HeaderName, Method, header};
use std::net::IpAddr;

/// Paths that need no token: the page asks for it, and says nothing that is secret.
const OPEN: [&str; 5] = ["/", "/style.css", "/script.js", "/healthz", "/openapi.json"];

/// Checks the headers of a request.
pub fn check(app: &App, method: &Method, path: &str, headers: &HeaderMap) -> Result<(), Refusal> {
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let host = text(header::HOST).unwrap_or_default();
    if !is_known(host, &app.settings.names) {
        let message = format!("the server does not know the name `{}`; start it with --allow-host NAME", name_of(host));
        return Err(Refusal::foreign(message));
    }
    let same = |origin: &str| origin.split_once("://").is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(host));
    let safe = [Method::GET, Method::HEAD].contains(method);
    if !safe && text(header::ORIGIN).is_some_and(|origin| !same(origin)) {
        return Err(Refusal::foreign("pages of other sites may not use the server"));
    }
    if OPEN.contains(&path) {
        return Ok(());
    }
    let sent = text(header::AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    });
    match app.token {
        // Digests are compared in constant time.
        Some(token) if sent.is_none_or(|sent| blake3::hash(sent.as_bytes()) != token) => Err(Refusal::no_token()),
        _ => Ok(()),
    }
}

/// `localhost:8000` → `localhost`
fn name_of(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Whether a browser that sends this host cannot have been led here by another site's name.
fn is_known(host: &str, names: &[String]) -> bool {
    let name = name_of(host);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    address.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || names.iter().any(|known| known.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_known_names_are_hosts() {
        let names = ["images.example".to_owned()];
        for known in ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:80", "192.168.0.3", "Images.Example:443"] {
            assert!(is_known(known, &names), "{known}");
        }
        for foreign in ["", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:80"]
        {
            assert!(!is_known(foreign, &names), "{foreign}");
        }
    }
}
