//! Lines of a text file, one at a time and of bounded length.

use crate::{
    data::{
        bad::{Bad, Cause},
        source_file::open_regular,
    },
    error::{Context, Result},
};
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

/// Maximum length of a line in bytes: an image of 64 MB in base64.
const MAX_LINE: usize = 90 << 20;
const BOM: &[u8] = b"\xef\xbb\xbf";

/// The lines of a file without their ends. Empty lines are skipped, and so is a byte order mark.
pub struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: u64,
}

impl Lines {
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut reader = BufReader::with_capacity(1 << 18, file);
        if reader.fill_buf().with_context(|| format!("cannot read {}", path.display()))?.starts_with(BOM) {
            reader.consume(BOM.len());
        }
        Ok(Self { path: path.to_owned(), reader, number: 0 })
    }

    /// The next line; `None` at the end of the file. The inner error is a line that is too long or not UTF-8.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn next(&mut self) -> Result<Option<Result<String, Bad>>> {
        loop {
            self.number += 1;
            let mut line = Vec::new();
            let complete = self.read(&mut line).with_context(|| format!("cannot read {}", self.path.display()))?;
            if !complete && line.is_empty() {
                return Ok(None);
            }
            while matches!(line.last(), Some(b'\n' | b'\r')) {
                line.pop();
            }
            if line.len() > MAX_LINE {
                return Ok(Some(Err(self.bad(Cause::TooLarge, "the line is too long"))));
            }
            let line = String::from_utf8(line).map_err(|e| self.bad(Cause::NotUtf8, e.utf8_error()));
            if line.as_ref().is_ok_and(|line| line.trim().is_empty()) {
                continue;
            }
            return Ok(Some(line));
        }
    }

    /// A bad line; `what` is wrong with the line read last.
    pub fn bad(&self, cause: Cause, what: impl std::fmt::Display) -> Bad {
        Bad::new(cause, format_args!("{}: line {}: {what}", self.path.display(), self.number))
    }

    /// Reads a line, of a long one only the beginning. False at the end of the file.
    fn read(&mut self, line: &mut Vec<u8>) -> std::io::Result<bool> {
        loop {
            let block = self.reader.fill_buf()?;
            let end = block.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(block.len(), |end| end + 1);
            if line.len() <= MAX_LINE {
                line.extend(block.iter().take(taken));
            }
            let (found, empty) = (end.is_some(), block.is_empty());
            self.reader.consume(taken);
            if found || empty {
                return Ok(found);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_may_have_a_bom_crlf_and_no_last_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.txt");
        std::fs::write(&path, b"\xef\xbb\xbf\xe4\xb8\x80\r\n\n  \nb\xb0\xa1\nc").unwrap();
        let mut lines = Lines::open(&path).unwrap();
        let mut next = || lines.next().unwrap().map(|line| line.map_err(|bad| (bad.cause, bad.place)));
        assert_eq!(next().unwrap().unwrap(), "一");
        let (cause, place) = next().unwrap().unwrap_err();
        assert!(cause == Cause::NotUtf8 && place.contains("x.txt: line 4"), "{place}");
        assert_eq!(next().unwrap().unwrap(), "c");
        assert!(next().is_none());
    }
}
