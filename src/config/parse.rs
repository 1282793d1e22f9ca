//! Parses TOML; errors name file, line and key, and the nearest known key or value.

use super::{Config, flat::values};
use crate::error::{Error, Result, plain_words, usage};

/// Reads TOML; errors name the place.
pub(super) fn parse<T: serde::de::DeserializeOwned>(text: &str, name: &str) -> Result<T> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        let key = line.and_then(|line| text.lines().nth(line - 1)?.split_once('=')).map_or("", |(key, _)| key.trim());
        let place = line.map_or(name.to_owned(), |line| format!("{name}:{line}"));
        // A complaint about a value does not name its key.
        let of_value = !key.is_empty() && e.message().starts_with("invalid");
        wrong(&if of_value { format!("{place}: `{key}`") } else { place }, &e)
    })
}

/// Converts serde's error to a usage error with the place and the nearest known key or value.
pub(super) fn wrong(place: &str, error: &toml::de::Error) -> Error {
    let message = plain_words(&error.message().trim().replace('\n', ", "));
    let unknown = message.strip_prefix("unknown field ").map(|rest| ("key", rest));
    let unknown = unknown.or_else(|| message.strip_prefix("unknown variant ").map(|rest| ("value", rest)));
    let Some((what, rest)) = unknown else {
        return usage(format_args!("{place}: {message}"), "`vilg config init` prints a commented example");
    };
    let mut names = rest.split('`').skip(1).step_by(2);
    let given = names.next().unwrap_or_default();
    let known: Vec<&str> = names.collect();
    usage(format_args!("{place}: unknown {what} `{given}`"), nearest(given, &known))
}

pub(super) fn nearest(given: &str, known: &[&str]) -> String {
    let closest = known.iter().map(|name| (strsim::jaro_winkler(given, name), name)).max_by(|a, b| a.0.total_cmp(&b.0));
    let home = values(&Config::default()).unwrap_or_default().into_iter().map(|(key, _)| key);
    let home = home.into_iter().find_map(|key| Some(key.split_once('.').filter(|(_, k)| *k == given)?.0.to_owned()));
    match (closest, home) {
        (Some((score, name)), _) if score > 0.8 => format!("did you mean `{name}`?"),
        (_, Some(section)) => format!("`{given}` is a key of [{section}]"),
        _ => format!("possible values: {}", known.join(", ")),
    }
}
