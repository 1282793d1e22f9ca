//! `manifest.json`: digests that tie the parts of a model folder together.
//!
//! Shapes cannot show that a vocabulary was reordered, that the number of heads is another or that weights are those of
//! another run. The manifest lists config.toml, vocab.txt and model.safetensors of its own folder, and the fingerprint of
//! the codes that the image tokenizer makes. The decoder of that tokenizer is left to the manifest in its own folder: it
//! may be exchanged. Folders without a manifest, which older versions wrote, are not checked.

use super::{CONFIG, VOCAB, WEIGHTS};
use crate::{
    error::{Context, Error, Hint, Result, ensure, failed, plain},
    report, runtime,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
};

/// The only format so far.
const FORMAT: u32 = 1;
/// Files up to this length are hashed whole.
const WHOLE: usize = 16 << 20;
/// Longer ones by this many equal windows at even distances: weights of another run differ everywhere.
const WINDOWS: usize = 256;
const WINDOW: usize = WHOLE / WINDOWS;

const HINT: &str = "copy the whole model folder again, or pass --allow-mismatch to use it all the same";

static ALLOWED: AtomicBool = AtomicBool::new(false);

/// From now on a part that does not fit its manifest is a warning instead of an error.
pub fn allow_mismatch() {
    ALLOWED.store(true, Ordering::Relaxed);
}

/// What the parts of a model folder must be like.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// The program that wrote the folder, with its version and commit.
    written_by: String,
    /// The command line that wrote it, and on which machine; empty in folders of older versions.
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    host: String,
    files: BTreeMap<String, Part>,
    /// Fingerprint of the codes of the image tokenizer: this one, or the one that a generator was trained with.
    pub codes: String,
}

/// What a file must be like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Part {
    bytes: u64,
    /// blake3 of the file's length and content; of a file above 16 MiB, of 256 windows of 64 KiB.
    blake3: String,
}

impl Part {
    fn of(bytes: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        if bytes.len() <= WHOLE {
            hasher.update(bytes);
        } else {
            let last = bytes.len() - WINDOW;
            for i in 0..WINDOWS {
                let start = (last as u128 * i as u128 / (WINDOWS - 1) as u128) as usize;
                hasher.update(&bytes[start..start + WINDOW]);
            }
        }
        Self { bytes: bytes.len() as u64, blake3: hasher.finalize().to_hex().to_string() }
    }
}

impl Manifest {
    /// The manifest of a folder with these files.
    pub fn new<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>, codes: String) -> Self {
        let files = files.into_iter().map(|(name, bytes)| (name.to_owned(), Part::of(bytes))).collect();
        let (written_by, command) = (format!("vilg {}", report::version()), runtime::command_line());
        Self { format: FORMAT, written_by, command, host: runtime::host_name(), files, codes }
    }

    /// Reads the text of a manifest; `name` is its file's name in messages.
    ///
    /// # Errors
    /// It is no manifest, or of a later version.
    pub fn parse(text: &[u8], name: &str) -> Result<Self> {
        let manifest: Self =
            serde_json::from_slice(text).map_err(plain).hint(format_args!("{name} is damaged"), HINT)?;
        let what = format!("{name}: its format is {}, this program reads {FORMAT}", manifest.format);
        ensure!(manifest.format == FORMAT, failed(what, "use a newer version of vilg"));
        // Nothing outside the folder, and nothing else in it, is ever opened on a manifest's word.
        let known = |name: &String| [CONFIG, WEIGHTS, VOCAB].contains(&name.as_str());
        let unknown = manifest.files.keys().find(|name| !known(name)).map_or("", String::as_str);
        ensure!(
            unknown.is_empty(),
            failed(format_args!("{name} lists `{unknown}`, which does not belong to a model folder"), HINT)
        );
        Ok(manifest)
    }

    /// The names of the files that are listed.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Checks the content of a listed file; `name` is its full name in messages.
    ///
    /// # Errors
    /// It is not the file that the folder was written with.
    pub fn check(&self, file: &str, bytes: &[u8], name: &str) -> Result<()> {
        let Some(part) = self.files.get(file) else { return Ok(()) };
        let length = bytes.len() as u64;
        let what = format!("{name} has {length} bytes, {} when the model folder was written", part.bytes);
        ensure!(length == part.bytes, mismatch(what));
        let what = format!("{name} is not the file that the model folder was written with");
        ensure!(Part::of(bytes) == *part, mismatch(what));
        Ok(())
    }
}

/// A part that does not fit the others.
pub fn mismatch(what: impl std::fmt::Display) -> Error {
    failed(what, HINT)
}

/// Whether the folder's parts fit: `Err` unless mismatches were allowed, then a warning.
pub fn accept(checked: Result<()>) -> Result<bool> {
    tolerate(checked).context("the parts of the model folder do not belong together")
}

/// Whether parts of different folders fit, as [`accept`] has it.
///
/// # Errors
/// That of `checked`, unless mismatches were allowed.
pub fn tolerate(checked: Result<()>) -> Result<bool> {
    match checked {
        Err(error) if ALLOWED.load(Ordering::Relaxed) => {
            report::warn(format_args!("{error:#}"));
            Ok(false)
        }
        checked => checked.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_are_told_apart_by_length_and_windows() {
        let zeros = vec![0; WHOLE + 1000];
        let part = Part::of(&zeros);
        assert_eq!(part, Part::of(&zeros));
        assert_ne!(part, Part::of(&zeros[1..]));
        for place in [0, WHOLE + 999] {
            let mut other = zeros.clone();
            other[place] = 1;
            assert_ne!(part, Part::of(&other), "{place}");
        }
    }

    #[test]
    fn names_outside_of_the_folder_are_refused() {
        let manifest = Manifest::new([(CONFIG, &b"x"[..])], "codes".into());
        let text = serde_json::to_string(&manifest).unwrap();
        assert!(Manifest::parse(text.as_bytes(), "m").is_ok());
        for name in ["../config.toml", "/etc/passwd", "image-tokenizer/config.toml"] {
            let error = Manifest::parse(text.replace(CONFIG, name).as_bytes(), "m").unwrap_err();
            assert!(format!("{error:#}").contains(&format!("lists `{name}`")), "{error:#}");
        }
        assert!(Manifest::parse(text.replace("\"format\":1", "\"format\":2").as_bytes(), "m").is_err());
        assert!(Manifest::parse(b"{}", "m").is_err());
        let error = format!("{:#}", Manifest::parse(b"{\"format\": \"one\"}", "m").unwrap_err());
        assert!(error.contains("expected a whole number"), "{error}");
    }

    #[test]
    fn program_command_and_host_are_recorded() {
        let manifest = serde_json::to_value(Manifest::new([], String::new())).unwrap();
        assert_eq!(manifest["written_by"], format!("vilg {}", report::version()));
        assert_eq!(manifest["command"], serde_json::json!(runtime::command_line()));
        assert_eq!(manifest["host"], runtime::host_name());
    }

    #[test]
    fn manifests_of_older_versions_have_no_command() {
        let mut manifest = serde_json::to_value(Manifest::new([], String::new())).unwrap();
        manifest.as_object_mut().unwrap().retain(|key, _| !["command", "host"].contains(&key.as_str()));
        let read = Manifest::parse(manifest.to_string().as_bytes(), "m").unwrap();
        assert!(read.command.is_empty() && read.host.is_empty());
    }
}
