//! The lines of a file from its end to its start, in bounded memory.

use crate::{
    bounded_read,
    error::{Context, Result},
};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// Bytes that are read at once.
const BLOCK: usize = 64 << 10;
/// Maximum length of a line in bytes.
const LONGEST: usize = 64 << 10;

/// A line without its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    Text(Vec<u8>),
    /// Longer than 64 KiB; its bytes are not kept.
    TooLong,
}

/// Lines of a regular file, the last one first.
pub struct LinesFromEnd {
    path: PathBuf,
    file: File,
    /// Where `pending` begins in the file.
    start: u64,
    /// Bytes whose lines were not given yet.
    pending: Vec<u8>,
    /// Whether the line that `pending` ends with is too long, and is left out of it.
    too_long: bool,
    ended: bool,
    /// Whether the file ends without a line end: its last line may be cut.
    pub is_cut: bool,
}

impl LinesFromEnd {
    /// Opens a file as long as it is now; lines that are written later are not read.
    ///
    /// # Errors
    /// It is not a regular file, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = bounded_read::open(path)?;
        let start = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        let mut lines = Self {
            path: path.to_owned(),
            file,
            start,
            pending: Vec::new(),
            too_long: false,
            ended: start == 0,
            is_cut: false,
        };
        lines.read_block()?;
        match lines.pending.last() {
            Some(b'\n') => drop(lines.pending.pop()),
            last => lines.is_cut = last.is_some(),
        }
        Ok(lines)
    }

    /// The line before the one that was given last.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn next(&mut self) -> Result<Option<Line>> {
        loop {
            if self.ended {
                return Ok(None);
            }
            if let Some(end) = self.pending.iter().rposition(|byte| *byte == b'\n') {
                let line = self.pending.split_off(end + 1);
                self.pending.truncate(end);
                return Ok(Some(self.line(line)));
            }
            if self.pending.len() > LONGEST {
                self.too_long = true;
                self.pending.clear();
            }
            if self.start == 0 {
                self.ended = true;
                let line = std::mem::take(&mut self.pending);
                return Ok(Some(self.line(line)));
            }
            self.read_block()?;
        }
    }

    fn line(&mut self, line: Vec<u8>) -> Line {
        match std::mem::take(&mut self.too_long) || line.len() > LONGEST {
            true => Line::TooLong,
            false => Line::Text(line),
        }
    }

    /// Puts the block before `pending` in front of it.
    fn read_block(&mut self) -> Result<()> {
        let length = self.start.min(BLOCK as u64);
        let mut block = vec![0; length as usize];
        let start = self.start - length;
        let read = self.file.seek(SeekFrom::Start(start)).and_then(|_| self.file.read_exact(&mut block));
        read.with_context(|| format!("cannot read {}", self.path.display()))?;
        block.append(&mut self.pending);
        (self.start, self.pending) = (start, block);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> (Vec<Line>, bool) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, content).unwrap();
        let mut lines = LinesFromEnd::open(file.path()).unwrap();
        let all = std::iter::from_fn(|| lines.next().unwrap()).collect();
        (all, lines.is_cut)
    }

    fn text(line: &str) -> Line {
        Line::Text(line.into())
    }

    #[test]
    fn lines_come_from_the_end_and_a_missing_line_end_is_noticed() {
        assert_eq!(read(b"a\nbc\n\nd\n"), (vec![text("d"), text(""), text("bc"), text("a")], false));
        assert_eq!(read(b"a\nb"), (vec![text("b"), text("a")], true));
        assert_eq!(read(b"a"), (vec![text("a")], true));
        assert_eq!(read(b"\n"), (vec![text("")], false));
        assert_eq!(read(b""), (vec![], false));
    }

    #[test]
    fn lines_may_cross_blocks_and_long_ones_are_not_kept() {
        let wanted: Vec<String> = (0..5000).map(|i| format!("{i}{}", "x".repeat(i % 97))).collect();
        let (lines, _) = read((wanted.join("\n") + "\n").as_bytes());
        assert_eq!(lines, wanted.iter().rev().map(|line| text(line)).collect::<Vec<_>>());
        for length in [LONGEST, LONGEST + 1, 2 * BLOCK, 5 * BLOCK + 7] {
            let (lines, _) = read(format!("a\n{}\nb\n", "x".repeat(length)).as_bytes());
            let middle = if length > LONGEST { Line::TooLong } else { text(&"x".repeat(length)) };
            assert_eq!(lines, [text("b"), middle, text("a")], "{length}");
        }
    }
}
