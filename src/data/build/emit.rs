//! Numbers the rows of a source, and sends them in batches to the thread that writes shards.

use super::{
    row::{Image, Row},
    seen::Seen,
};
use crate::{
    data::bad::{Bad, BadCounts, Cause},
    error::{Error, Result, anyhow},
};
use std::sync::mpsc::SyncSender;

/// A batch ends with this many rows.
const BATCH_ROWS: usize = 64;
/// A batch also ends with this many bytes of images.
const BATCH_BYTES: u64 = 32 << 20;

/// A row with its number in the source.
pub struct Numbered {
    pub number: u64,
    pub row: Result<Row, Bad>,
}

/// What a source sends.
pub enum Message {
    /// Consecutive rows of one shard.
    Rows(Vec<Numbered>),
    EndOfShard,
    /// Damage that belongs to no row.
    Damage(BadCounts),
    /// Files that belong to no row.
    Ignored(BadCounts),
    /// The source cannot be read further.
    Failed(Error),
}

/// Receives the rows of a source. Rows with an id that occurred before become bad rows.
pub struct Emit {
    sender: SyncSender<Message>,
    rows_per_shard: u64,
    next: u64,
    batch: Vec<Numbered>,
    batch_bytes: u64,
    seen: Seen,
}

impl Emit {
    pub fn new(sender: SyncSender<Message>, rows_per_shard: u64) -> Self {
        Self { sender, rows_per_shard, next: 0, batch: Vec::new(), batch_bytes: 0, seen: Seen::default() }
    }

    /// Adds the next row.
    ///
    /// # Errors
    /// The writer has stopped.
    pub fn row(&mut self, row: Result<Row, Bad>) -> Result<()> {
        let row = row.and_then(|row| self.check(row));
        self.batch_bytes += row.as_ref().map_or(0, |row| row.image.size());
        self.batch.push(Numbered { number: self.next, row });
        self.next += 1;
        if self.next.is_multiple_of(self.rows_per_shard) {
            self.end_shard()
        } else if self.batch.len() >= BATCH_ROWS || self.batch_bytes >= BATCH_BYTES {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Counts damage that belongs to no row.
    ///
    /// # Errors
    /// The writer has stopped.
    pub fn damage(&mut self, bad: Bad) -> Result<()> {
        let mut counts = BadCounts::default();
        counts.add(bad);
        self.damages(counts)
    }

    /// Counts damage that belongs to no row.
    ///
    /// # Errors
    /// The writer has stopped.
    pub fn damages(&mut self, counts: BadCounts) -> Result<()> {
        self.send(Message::Damage(counts))
    }

    /// Counts files that belong to no row.
    ///
    /// # Errors
    /// The writer has stopped.
    pub fn ignored(&mut self, counts: BadCounts) -> Result<()> {
        self.send(Message::Ignored(counts))
    }

    /// Ends the last shard.
    ///
    /// # Errors
    /// The writer has stopped.
    pub fn finish(&mut self) -> Result<()> {
        if self.next.is_multiple_of(self.rows_per_shard) { Ok(()) } else { self.end_shard() }
    }

    /// Reports why the source cannot be read further.
    pub fn fail(&mut self, error: Error) {
        // A writer that has stopped has an error of its own.
        let _ = self.send(Message::Failed(error));
    }

    fn check(&mut self, row: Row) -> Result<Row, Bad> {
        if let Some(id) = row.id.as_ref().filter(|id| !self.seen.is_new(id)) {
            return Err(Bad::new(Cause::Duplicate, id));
        }
        match &row.image {
            Image::File { path, .. } if !path.exists() => Err(Bad::new(Cause::NoImage, path.display())),
            _ => Ok(row),
        }
    }

    fn end_shard(&mut self) -> Result<()> {
        self.flush()?;
        self.send(Message::EndOfShard)
    }

    fn flush(&mut self) -> Result<()> {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() { Ok(()) } else { self.send(Message::Rows(batch)) }
    }

    fn send(&self, message: Message) -> Result<()> {
        self.sender.send(message).map_err(|_| anyhow!("the writer of shards has stopped"))
    }
}
