//! Opens source files of a data set without blocking on pipes and devices, and recognizes the format of files that are not
//! tar archives.

use super::bad::{Bad, Cause};
use crate::bounded_read::open_without_waiting;
use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

/// Maximum size of an image, caption or JSON file in bytes.
pub const MAX_FILE: u64 = 64 << 20;

/// Reads a regular file of at most [`MAX_FILE`] bytes.
///
/// # Errors
/// The file is missing, too large, not a regular file, or cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>, Bad> {
    let bad = |cause: Cause| Bad::new(cause, path.display());
    let mut content = Vec::new();
    let read = open_regular(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut content));
    match read {
        Ok(_) if content.len() as u64 > MAX_FILE => Err(bad(Cause::TooLarge)),
        Ok(_) => Ok(content),
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => Err(bad(Cause::NotAFile)),
        Err(e) => Err(Bad::new(Cause::Unreadable, format_args!("{}: {e}", path.display()))),
    }
}

/// Opens a regular file for reading.
///
/// # Errors
/// The path is a folder, a pipe or a device, or it cannot be opened.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let not_regular = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
    // Checked first: opening a device can have side effects.
    if !fs::metadata(path)?.is_file() {
        return Err(not_regular());
    }
    // The file may have become a pipe in the meantime, and opening a pipe without a writer blocks.
    let file = open_without_waiting(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(not_regular()) }
}

/// Magic bytes of formats that are mistaken for tar archives, and how to convert them.
const FORMATS: [(&[u8], &str); 11] = [
    (b"\x1f\x8b", "compressed with gzip; unpack it with `gunzip` (rename it to .tar.gz first)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it with `zstd -d`"),
    (b"BZh", "compressed with bzip2; unpack it with `bunzip2`"),
    (b"\xfd7zXZ\0", "compressed with xz; unpack it with `unxz`"),
    (b"PK\x03\x04", "a zip archive; unpack it and pack its files with `tar`"),
    (b"PAR1", "a parquet table; make shards of it with img2dataset, for example"),
    (b"ARROW1", "an Arrow table; make shards of it with img2dataset, for example"),
    (b"\x89HDF", "an HDF5 file; write its samples as images and captions into tar shards"),
    (b"\x89PNG", "a PNG image; name it .png"),
    (b"\xff\xd8\xff", "a JPEG image; name it .jpg"),
    (b"RIFF", "a RIFF file (WebP?); name it .webp if it is an image"),
];

const JSON: &str = "JSON text; make shards of it with img2dataset, for example";

/// The format of a file that is not a tar archive, by its first bytes; `None` if it is unknown.
pub fn foreign_format(head: &[u8]) -> Option<&'static str> {
    if let Some((_, format)) = FORMATS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(format);
    }
    let valid = match std::str::from_utf8(head) {
        Ok(text) => text,
        // The head may end in the middle of a character.
        Err(e) if e.error_len().is_none() => std::str::from_utf8(&head[..e.valid_up_to()]).unwrap_or_default(),
        Err(_) => return None,
    };
    let text = valid.trim_start_matches('\u{feff}');
    if text.is_empty() || text.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        return None;
    }
    // `[section]` starts a TOML file, not JSON.
    let begins_list = |rest: &str| rest.trim_start().starts_with(['{', '[', '"', ']']);
    let text = text.trim_start();
    Some(match text.chars().next() {
        Some('{') => JSON,
        Some('[') if begins_list(&text[1..]) => JSON,
        _ if text.contains('\t') => "a table in text (TSV); make shards of it with img2dataset, for example",
        _ => "text",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_recognised_by_their_first_bytes() {
        let starts = |head: &[u8], expected: &str| {
            assert!(foreign_format(head).is_some_and(|format| format.starts_with(expected)), "{expected}");
        };
        starts(b"\x1f\x8b\x08", "compressed with gzip");
        starts(b"PAR1\x15", "a parquet");
        starts(b" {\"url\": 1}", "JSON");
        starts("url\tcaption\n\u{6708}".as_bytes(), "a table");
        starts(&"一轮弯月".as_bytes()[..11], "text");
        assert_eq!(foreign_format(b"name\0\0"), None);
        assert_eq!(foreign_format(b""), None);
        assert_eq!(foreign_format(b"a\xff\xfe"), None);
    }
}
