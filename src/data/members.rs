//! The members of one sample.

use std::ops::Range;

/// Extensions of unsupported image formats; such a sample is counted as
/// [`UnsupportedImage`](super::bad::Cause::UnsupportedImage).
pub const UNSUPPORTED_EXTENSIONS: [&str; 12] =
    ["avif", "svg", "heic", "heif", "jxl", "jp2", "psd", "ico", "tga", "exr", "hdr", "eps"];

/// The members of one sample that were read.
#[derive(Debug, Default)]
pub struct Members {
    bytes: Vec<u8>,
    members: Vec<(String, Range<usize>)>,
    unsupported: Option<String>,
}

impl Members {
    /// The content of the member with this extension.
    pub fn get(&self, extension: &str) -> Option<&[u8]> {
        let (_, range) = self.members.iter().find(|(other, _)| other == extension)?;
        self.bytes.get(range.clone())
    }

    /// Adds a member that was read from a separate file.
    pub fn push(&mut self, extension: &str, content: &[u8]) {
        self.bytes.extend_from_slice(content);
        self.end_member(extension);
    }

    /// Records a member that was not read.
    pub fn skip(&mut self, extension: &str) {
        if UNSUPPORTED_EXTENSIONS.contains(&extension) {
            self.unsupported = Some(extension.to_owned());
        }
    }

    /// The extension of a skipped image in an unsupported format.
    pub fn unsupported(&self) -> Option<&str> {
        self.unsupported.as_deref()
    }

    /// The content of all members. Bytes appended here become a member through [`Members::end_member`].
    pub(super) fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Turns the bytes after the last member into a member.
    pub(super) fn end_member(&mut self, extension: &str) {
        let start = self.members.last().map_or(0, |(_, range)| range.end);
        self.members.push((extension.to_owned(), start..self.bytes.len()));
    }
}
