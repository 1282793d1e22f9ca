//! JSON lines: one object on each line.

use super::{BATCH_BYTES, BATCH_ROWS, MAX_ROW, Row};
use crate::{
    data::bad::{Bad, Cause},
    error::Result,
};
use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
};

/// Reads lines; empty ones are skipped.
pub struct Reader {
    file: BufReader<File>,
    begun: bool,
}

/// Lines without their ends. A line beyond [`MAX_ROW`] is `None`.
pub struct Lines {
    bytes: Vec<u8>,
    ends: Vec<(usize, bool)>,
}

impl Reader {
    pub fn new(file: File) -> Self {
        Self { file: BufReader::with_capacity(1 << 20, file), begun: false }
    }

    pub fn next_batch(&mut self) -> Result<Option<Lines>> {
        let mut lines = Lines { bytes: Vec::new(), ends: Vec::new() };
        while lines.len() < BATCH_ROWS && lines.bytes.len() < BATCH_BYTES && self.next_line(&mut lines)? {}
        Ok((lines.len() > 0).then_some(lines))
    }

    /// Appends the next line that is not empty; false at the end of the file.
    fn next_line(&mut self, lines: &mut Lines) -> Result<bool> {
        loop {
            let start = lines.bytes.len();
            let read = self.file.by_ref().take(MAX_ROW as u64 + 1).read_until(b'\n', &mut lines.bytes)?;
            if read == 0 {
                return Ok(false);
            }
            if !std::mem::replace(&mut self.begun, true) && lines.bytes[start..].starts_with(b"\xef\xbb\xbf") {
                lines.bytes.drain(start..start + 3);
            }
            let whole = lines.bytes.ends_with(b"\n") || read <= MAX_ROW;
            if !whole {
                lines.bytes.truncate(start);
                self.file.skip_until(b'\n')?;
            }
            let line = lines.bytes.get(start..).unwrap_or_default().trim_ascii_end().len();
            lines.bytes.truncate(start + line);
            if line > 0 || !whole {
                lines.ends.push((start + line, whole));
                return Ok(true);
            }
        }
    }
}

impl Lines {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The line without its end; empty if it was too long.
    pub fn line(&self, index: usize) -> &[u8] {
        let end = |index: usize| self.ends.get(index).map_or(0, |(end, _)| *end);
        let start = if index == 0 { 0 } else { end(index - 1) };
        self.bytes.get(start..end(index)).unwrap_or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|index| self.line(index))
    }

    pub fn row(&self, index: usize) -> Result<Row<'_>, Bad> {
        if self.ends.get(index).is_some_and(|(_, whole)| !whole) {
            return Err(Bad::new(Cause::TooLarge, format_args!("longer than {MAX_ROW} bytes")));
        }
        let line = self.line(index);
        if let Err(e) = std::str::from_utf8(line) {
            return Err(Bad::new(Cause::NotUtf8, e));
        }
        serde_json::from_slice(line).map(Row::Json).map_err(|e| Bad::new(Cause::BadJson, e))
    }
}
