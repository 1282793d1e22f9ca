//! A remote shard: its URL, its name, and what is known of it before it is downloaded.

use super::{
    answer::Entry,
    location::{Location, name_of_command, shown},
};
use std::{fmt, path::PathBuf};

/// A shard that is not on this machine.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteShard {
    /// As given by the user; may contain secrets.
    source: String,
    pub(super) location: Location,
    /// Relative path below the folder of the source; without `..`.
    pub name: PathBuf,
    /// Size in bytes, by the listing.
    pub size: Option<u64>,
    /// Version by the listing: an ETag, or the digest that Hugging Face lists.
    pub version: Option<String>,
}

impl RemoteShard {
    pub(super) fn new(source: String, location: Location, name: PathBuf) -> Self {
        Self { source, location, name, size: None, version: None }
    }

    pub(super) fn listed(source: String, location: Location, name: PathBuf, entry: Entry) -> Self {
        Self { source, location, name, size: Some(entry.size), version: entry.version }
    }

    /// The file `name` in the folder of the shard; for `pipe:`, the command with the shard's name replaced.
    pub fn beside(&self, name: &str) -> Self {
        let parent = |path: &str| path.rfind('/').and_then(|slash| path.get(..=slash)).unwrap_or_default().to_owned();
        let (source, location) = match &self.location {
            Location::S3 { key: path, .. } | Location::HuggingFace { path, .. } => {
                let location = self.location.with_path(&(parent(path) + name));
                (parent(&self.source) + name, location)
            }
            Location::Http { url } => {
                let (path, query) = url.split_at(url.find(['?', '#']).unwrap_or(url.len()));
                let url = parent(path) + name + query;
                (url.clone(), Location::Http { url })
            }
            Location::Pipe { command } => {
                let command = command.replace(&name_of_command(command), name);
                (format!("pipe:{command}"), Location::Pipe { command })
            }
        };
        Self::new(source, location, self.name.with_file_name(name))
    }

    /// The URL without user name, password and query; of `pipe:`, only the first word of the command.
    pub fn url(&self) -> String {
        shown(&self.source)
    }

    /// Name of the shard in a cache: a digest of URL and version, 32 hexadecimal digits.
    pub fn key(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.source.as_bytes()).update(&[0]).update(self.version.as_deref().unwrap_or("").as_bytes());
        format!("{:.32}", hasher.finalize().to_hex())
    }
}

impl fmt::Debug for RemoteShard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, size, version, .. } = self;
        write!(f, "RemoteShard {{ url: {:?}, name: {name:?}, size: {size:?}, version: {version:?} }}", self.url())
    }
}

#[cfg(test)]
mod tests {
    use super::super::list;

    #[test]
    fn files_beside_a_shard_have_its_folder() {
        for (source, expected) in [
            ("s3://b/p/0.tar", "s3://b/p/codes.json"),
            ("s3://b/0.tar", "s3://b/codes.json"),
            ("hf://datasets/o/n@v/x/0.tar", "hf://datasets/o/n@v/x/codes.json"),
            ("https://h/p/0.tar?a=/b.tar", "https://h/p/codes.json?a=/b.tar"),
            ("pipe:ssh host cat p/0.tar", "pipe:ssh host cat p/codes.json"),
        ] {
            let beside = list(source).unwrap()[0].beside("codes.json");
            assert_eq!(beside.source, expected);
            assert_eq!(beside.name.to_str().unwrap(), "codes.json");
        }
    }
}
