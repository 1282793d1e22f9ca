//! Parses the URLs of remote shards, and writes them without secrets.

use crate::error::{Result, usage};
use std::path::PathBuf;

/// Where a remote file is stored.
#[derive(Clone, PartialEq, Eq)]
pub enum Location {
    /// An object of S3, or of another service with its protocol.
    S3 { service: Service, bucket: String, key: String },
    /// A URL with `http:` or `https:`.
    Http { url: String },
    /// A file of a data set on Hugging Face.
    HuggingFace { dataset: String, revision: String, path: String },
    /// The output of a shell command.
    Pipe { command: String },
}

/// A service with the protocol of S3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    /// `s3://`: configured by `AWS_*` variables.
    S3,
    /// `oss://`, Alibaba Cloud OSS: configured by `OSS_*` variables.
    Oss,
}

/// Whether a source is remote.
pub fn is_remote(source: &str) -> bool {
    source.starts_with("pipe:") || scheme(source).is_some()
}

/// The scheme of a remote URL, and what follows it.
fn scheme(source: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = source.split_once("://")?;
    ["s3", "oss", "http", "https", "hf"].contains(&scheme).then_some((scheme, rest))
}

impl Location {
    /// Parses a URL without brace lists.
    ///
    /// # Errors
    /// The URL has no bucket, host or data set.
    pub fn parse(url: &str) -> Result<Self> {
        if let Some(command) = url.strip_prefix("pipe:") {
            let none = || usage("`pipe:` has no command", "write `pipe:COMMAND`; its output is a tar shard");
            return if command.trim().is_empty() {
                Err(none())
            } else {
                Ok(Self::Pipe { command: command.to_owned() })
            };
        }
        let wrong = |form: &str| usage(format_args!("`{}` is not a remote URL", shown(url)), format!("write `{form}`"));
        match scheme(url) {
            Some(("hf", rest)) => hugging_face(rest).ok_or_else(|| {
                wrong("hf://datasets/OWNER/NAME/PATH; for a revision hf://datasets/OWNER/NAME@REVISION/PATH")
            }),
            Some(("http" | "https", rest)) if !rest.is_empty() && !rest.starts_with('/') => {
                Ok(Self::Http { url: url.to_owned() })
            }
            Some((name @ ("s3" | "oss"), rest)) if !rest.is_empty() && !rest.starts_with('/') => {
                let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
                let service = if name == "s3" { Service::S3 } else { Service::Oss };
                Ok(Self::S3 { service, bucket: bucket.to_owned(), key: key.to_owned() })
            }
            _ => Err(wrong("s3://BUCKET/PATH, oss://BUCKET/PATH, https://HOST/PATH or hf://datasets/OWNER/NAME/PATH")),
        }
    }

    /// Path of the file in its bucket or data set; `None` where files cannot be listed.
    pub fn path(&self) -> Option<&str> {
        match self {
            Self::S3 { key, .. } => Some(key),
            Self::HuggingFace { path, .. } => Some(path),
            Self::Http { .. } | Self::Pipe { .. } => None,
        }
    }

    /// The same bucket or data set with another path.
    pub fn with_path(&self, new: &str) -> Self {
        let mut location = self.clone();
        if let Self::S3 { key: path, .. } | Self::HuggingFace { path, .. } = &mut location {
            new.clone_into(path);
        }
        location
    }
}

/// `datasets/OWNER/NAME[@REVISION]/PATH`
fn hugging_face(rest: &str) -> Option<Location> {
    let mut parts = rest.strip_prefix("datasets/")?.splitn(3, '/');
    let (owner, name, path) = (parts.next()?, parts.next()?, parts.next().unwrap_or_default());
    let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
    let complete = ![owner, name, revision].contains(&"");
    complete.then(|| Location::HuggingFace {
        dataset: format!("{owner}/{name}"),
        revision: revision.to_owned(),
        path: path.to_owned(),
    })
}

/// A URL for messages and records: without user name, password, query and fragment, which may be secret. Of a command, only
/// the first word.
pub fn shown(url: &str) -> String {
    if let Some(command) = url.strip_prefix("pipe:") {
        let mut words = command.split_whitespace();
        let first = words.next().unwrap_or_default();
        // `KEY=secret command`
        let first = if first.contains('=') { "" } else { first };
        return format!("pipe:{first}{}", if words.next().is_some() { " ..." } else { "" });
    }
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let is_http = matches!(scheme, "http" | "https");
    let rest = if is_http { rest.split(['?', '#']).next().unwrap_or_default() } else { rest };
    let (host, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
    let host = if is_http { host.rsplit('@').next().unwrap_or_default() } else { host };
    format!("{scheme}://{host}{path}")
}

/// Name of the file that a command writes: the last word that ends in `.tar`, else a digest of the command.
pub fn name_of_command(command: &str) -> String {
    let word = |c: char| c.is_whitespace() || "/'\"|;<>()?&=".contains(c);
    let named = command.split(word).rfind(|word| word.len() > 4 && word.ends_with(".tar") && !word.starts_with('.'));
    let digest = || format!("pipe-{:.16}.tar", blake3::hash(command.as_bytes()).to_hex());
    named.map_or_else(digest, str::to_owned)
}

/// The part of a URL below `base`, as a relative path. In an `http` URL, `%..` is decoded and the query is left out.
///
/// # Errors
/// The path would lead out of a folder (`..`), or a name is empty, begins with a dot or has control characters.
pub fn name_below(base: &str, url: &str) -> Result<PathBuf> {
    let rest = url.strip_prefix(base).unwrap_or(url);
    let is_http = url.starts_with("http://") || url.starts_with("https://");
    let name = if is_http { decoded(rest.split(['?', '#']).next().unwrap_or_default()) } else { Some(rest.to_owned()) };
    let wrong = |part: &str| part.is_empty() || part.starts_with('.') || part.chars().any(char::is_control);
    match name {
        Some(name) if !name.split('/').any(wrong) => Ok(PathBuf::from(name)),
        _ => Err(usage(
            format_args!("`{}` cannot be the name of a local file", shown(url).escape_debug()),
            "names must not be empty, begin with a dot or contain control characters",
        )),
    }
}

/// Decodes `%E6%9C%88`; `None` if the result is not UTF-8.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..2).filter(|_| *first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_recognized() {
        for source in
            ["s3://b/p", "oss://b/p", "https://h/x.tar", "http://h/x", "hf://datasets/o/n/x", "pipe:cat x.tar"]
        {
            assert!(is_remote(source) && Location::parse(source).is_ok(), "{source}");
        }
        for source in ["data/x.tar", "/s3/x.tar", "ftp://h/x.tar", "s3:/b/x.tar", "file:///x.tar"] {
            assert!(!is_remote(source), "{source}");
        }
        for source in ["s3://", "s3:///x.tar", "https://", "hf://o/n/x.tar", "hf://datasets/o", "pipe: "] {
            assert!(is_remote(source) && Location::parse(source).is_err(), "{source}");
        }
        let location = Location::parse("hf://datasets/o/n@v1/a/b.tar").unwrap();
        let (dataset, revision, path) = ("o/n".to_owned(), "v1".to_owned(), "a/b.tar".to_owned());
        assert!(location == Location::HuggingFace { dataset, revision, path });
    }

    #[test]
    fn secrets_are_not_shown() {
        assert_eq!(shown("https://me:secret@host/a/b.tar?sig=secret#x"), "https://host/a/b.tar");
        assert_eq!(shown("https://me:se@cret@host"), "https://host");
        assert_eq!(shown("s3://bucket/月/a?.tar"), "s3://bucket/月/a?.tar");
        assert_eq!(shown("pipe:curl -H 'Authorization: secret' x"), "pipe:curl ...");
        assert_eq!(shown("pipe:TOKEN=secret curl"), "pipe: ...");
    }

    #[test]
    fn names_stay_inside_the_folder() {
        let name = |url: &str| name_below("https://h/p/", url).map(|name| name.to_str().unwrap().to_owned());
        assert_eq!(name("https://h/p/a/%E6%9C%88.tar?x=../y").unwrap(), "a/月.tar");
        assert_eq!(name("https://h/p/100%.tar").unwrap(), "100%.tar");
        for bad in [
            "../x.tar",
            "a/../x.tar",
            "%2e%2e%2fx.tar",
            "..%2Fx.tar",
            "",
            "a//b.tar",
            ".hidden",
            "a%0A.tar",
            "%ff.tar",
            "/x",
        ] {
            assert!(name(&format!("https://h/p/{bad}")).is_err(), "{bad}");
        }
        assert!(name_below("s3://b/p/", "s3://b/p/../x.tar").is_err());
        assert_eq!(name_below("s3://b/p/", "s3://b/p/%2e.tar").unwrap(), PathBuf::from("%2e.tar"));
    }

    #[test]
    fn commands_name_their_shard() {
        assert_eq!(name_of_command("aws s3 cp s3://b/p/00001.tar -"), "00001.tar");
        assert_eq!(name_of_command("cat '../x/00002.tar'"), "00002.tar");
        assert!(name_of_command("cat x | gunzip").starts_with("pipe-"));
        assert!(name_of_command("cat ..tar").starts_with("pipe-"));
    }
}
