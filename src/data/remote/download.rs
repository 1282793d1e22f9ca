//! Downloads one file: attempts are repeated, cut transfers are resumed, and versions are never mixed.

use super::{
    answer::{Answer, Body, Failure, Limits, Stopped, Wanted},
    client,
    location::Location,
    pipe,
    record::{Partial, Record, digest},
    shard::RemoteShard,
};
use crate::{
    error::{Result, failed},
    report,
};
use std::{
    fs::File,
    hash::{BuildHasher, RandomState},
    io::{Seek, SeekFrom, Write},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

/// Bytes and time after which an incomplete download is secured: a process that is killed loses at most this much.
const SECURE_BYTES: u64 = 64 << 20;
const SECURE_TIME: Duration = Duration::from_secs(2);
/// Minimum number of bytes by which a file of unknown size grows; a large one grows by an eighth.
const GROWTH: u64 = 64 << 10;
/// Time between two looks at the sign to stop.
const POLL: Duration = Duration::from_millis(50);

/// What a download needs besides its source.
pub struct Task<'a> {
    pub shard: &'a RemoteShard,
    pub limits: Limits,
    /// The incomplete file and its record.
    pub part: &'a Path,
    pub partial: &'a Path,
    /// Called with the number of bytes that the file needs, before it grows to it.
    pub reserve: &'a dyn Fn(u64) -> Result<()>,
    /// Called with the number of new bytes.
    pub progress: &'a dyn Fn(u64),
    /// Ends the download early.
    pub stop: &'a AtomicBool,
}

/// A download in progress.
struct Download<'a> {
    task: &'a Task<'a>,
    file: File,
    hasher: blake3::Hasher,
    /// Bytes that are written.
    at: u64,
    etag: Option<String>,
    size: Option<u64>,
    reserved: u64,
    /// When and up to which byte the file was secured.
    secured: (Instant, u64),
}

/// Downloads a shard to the open and locked file `part`, or resumes the download of an earlier process. Returns `None` if the
/// server still has the version with ETag `known`.
///
/// # Errors
/// The server refuses, all attempts failed, the file changes again and again, or the disk is full.
pub fn download(task: &Task<'_>, part: File, known: Option<&str>) -> Result<Option<Record>> {
    let mut download = Download::resume(task, part).map_err(|stopped| give_up(stopped, task.shard, 1))?;
    let mut furthest = download.at;
    let (mut attempts, mut total) = (0, 0);
    let mut wait = task.limits.first_wait;
    loop {
        total += 1;
        let stopped = match download.attempt(known) {
            Ok(done) => return Ok(done),
            Err(stopped) => stopped,
        };
        if download.at > furthest {
            (furthest, attempts, wait) = (download.at, 0, task.limits.first_wait);
        }
        attempts += 1;
        match stopped {
            Stopped::Remote(failure) if failure.retry && attempts < task.limits.attempts => {
                let pause = jittered(wait).max(failure.after.unwrap_or_default()).min(task.limits.max_wait);
                report::detail(format_args!(
                    "{}: {}; next attempt in {:.1} s",
                    task.shard.url(),
                    failure.message,
                    pause.as_secs_f64()
                ));
                sleep(pause, task)?;
                wait = (wait * 2).min(task.limits.max_wait);
            }
            stopped => {
                // The next run resumes from here. An error of this would hide the error that ended the download.
                let _ = download.secure();
                return Err(give_up(stopped, task.shard, total));
            }
        }
    }
}

fn give_up(stopped: Stopped, shard: &RemoteShard, attempts: u32) -> crate::error::Error {
    match stopped {
        Stopped::Remote(failure) => failure.into_error(&shard.url(), attempts),
        Stopped::Local(error) => error,
    }
}

/// Between half and all of `wait`, so that many clients do not repeat their requests at the same time.
fn jittered(wait: Duration) -> Duration {
    let share = (RandomState::new().hash_one(0) >> 32) as f64 / f64::from(u32::MAX);
    wait.mul_f64(0.5 + 0.5 * share)
}

fn sleep(pause: Duration, task: &Task<'_>) -> Result<()> {
    let end = Instant::now() + pause;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        check_stop(task)?;
        thread::sleep(left.min(POLL));
    }
    Ok(())
}

fn check_stop(task: &Task<'_>) -> Result<()> {
    match task.stop.load(Ordering::Relaxed) {
        true => Err(failed(format_args!("{}: stopped", task.shard.url()), "run the command again to resume")),
        false => Ok(()),
    }
}

impl<'a> Download<'a> {
    /// Continues with the bytes that an earlier process secured.
    fn resume(task: &'a Task<'a>, file: File) -> Result<Self, Stopped> {
        let (hasher, secured) = (blake3::Hasher::new(), (Instant::now(), 0));
        let mut download = Self { task, file, hasher, at: 0, etag: None, size: None, reserved: 0, secured };
        if let Some(partial) = Partial::read(task.partial)
            && partial.url == task.shard.url()
            && partial.version == task.shard.version
            && partial.length > 0
            && strong(partial.etag.as_deref()).is_some()
            && let Some(hasher) =
                digest(&mut download.file, partial.length).map_err(|e| Stopped::local(e, task.part))?
            && hasher.finalize().to_hex().as_str() == partial.blake3
        {
            (download.hasher, download.at, download.etag, download.size) =
                (hasher, partial.length, partial.etag, partial.size);
            download.secured.1 = download.at;
            report::detail(format_args!("{}: resumes after {} bytes", task.shard.url(), download.at));
        }
        download.reserved = download.file.metadata().map_err(|e| Stopped::local(e, task.part))?.len();
        Ok(download)
    }

    /// One request and the transfer of its answer.
    fn attempt(&mut self, known: Option<&str>) -> Result<Option<Record>, Stopped> {
        if strong(self.etag.as_deref()).is_none() {
            self.start_again()?;
        }
        let shard = self.task.shard;
        let wanted = Wanted { start: self.at, etag: self.etag.as_deref(), known };
        let answer = match &shard.location {
            Location::Pipe { command } => pipe::open(command, &self.task.limits)?,
            location => client::open(location, &wanted, &self.task.limits)?,
        };
        let mut body = match answer {
            Answer::NotModified => return Ok(None),
            Answer::Changed => {
                self.start_again()?;
                return Err(Failure::temporary("the file changed during the download").into());
            }
            Answer::Body(body) => body,
        };
        if body.start != self.at {
            self.start_again()?;
        } else if self.at > 0 && self.size != body.size {
            self.start_again()?;
            return Err(Failure::temporary("the size changed during the download").into());
        }
        self.check(&body)?;
        (self.etag, self.size) = (body.etag.take(), body.size);
        self.file.seek(SeekFrom::Start(self.at)).map_err(|e| Stopped::local(e, self.task.part))?;
        self.reserve(self.size.unwrap_or(0))?;
        let mut buffer = Vec::new();
        while (body.read)(&mut buffer)? {
            check_stop(self.task).map_err(Stopped::Local)?;
            self.write(&buffer)?;
        }
        let expected = self.size.or(shard.size);
        if let Some(size) = expected.filter(|size| *size != self.at) {
            let message = format!("the transfer ended after {} of {size} bytes", self.at);
            return Err(Failure::temporary(message).into());
        }
        self.finish().map(Some)
    }

    /// Compares the answer with the listing.
    fn check(&self, body: &Body) -> Result<(), Failure> {
        let hint = "the file changed after it was listed; run the command again";
        let shard = self.task.shard;
        if let Some((listed, size)) = shard.size.zip(body.size)
            && listed != size
        {
            return Err(Failure::permanent(format_args!("has {size} bytes, but {listed} by the listing"), hint));
        }
        // Hugging Face lists digests instead of ETags.
        if matches!(shard.location, Location::S3 { .. })
            && let Some((listed, etag)) = shard.version.as_deref().zip(body.etag.as_deref())
            && listed.trim_matches('"') != etag.trim_matches('"')
        {
            return Err(Failure::permanent("has another ETag than by the listing", hint));
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Stopped> {
        let after = self.at + bytes.len() as u64;
        if let Some(size) = self.size.filter(|size| after > *size) {
            return Err(Failure::temporary(format_args!("the server sent more than {size} bytes")).into());
        }
        if after > self.reserved {
            self.reserve(after + GROWTH.max(after / 8))?;
        }
        self.file.write_all(bytes).map_err(|e| Stopped::local(e, self.task.part))?;
        self.hasher.update(bytes);
        self.at = after;
        (self.task.progress)(bytes.len() as u64);
        if self.at - self.secured.1 >= SECURE_BYTES || self.secured.0.elapsed() >= SECURE_TIME {
            self.secure()?;
        }
        Ok(())
    }

    /// Gives the file the length that it will need, so that other processes can see it.
    fn reserve(&mut self, size: u64) -> Result<(), Stopped> {
        if size > self.reserved {
            (self.task.reserve)(size).map_err(Stopped::Local)?;
            self.file.set_len(size).map_err(|e| Stopped::local(e, self.task.part))?;
            self.reserved = size;
        }
        Ok(())
    }

    /// Flushes the file to the disk and records its length and digest.
    fn secure(&mut self) -> Result<(), Stopped> {
        self.secured = (Instant::now(), self.at);
        if self.at == 0 || strong(self.etag.as_deref()).is_none() {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| Stopped::local(e, self.task.part))?;
        let partial = Partial {
            url: self.task.shard.url(),
            version: self.task.shard.version.clone(),
            etag: self.etag.clone(),
            size: self.size,
            length: self.at,
            blake3: self.hasher.finalize().to_hex().to_string(),
        };
        partial.write(self.task.partial).map_err(Stopped::Local)
    }

    fn start_again(&mut self) -> Result<(), Stopped> {
        self.hasher = blake3::Hasher::new();
        (self.at, self.etag, self.size, self.reserved) = (0, None, None, 0);
        self.secured = (Instant::now(), 0);
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(|e| Stopped::local(e, self.task.part))
    }

    fn finish(&mut self) -> Result<Record, Stopped> {
        let finished = self.file.set_len(self.at).and_then(|()| self.file.sync_all());
        finished.map_err(|e| Stopped::local(e, self.task.part))?;
        Ok(Record {
            url: self.task.shard.url(),
            version: self.task.shard.version.clone(),
            etag: self.etag.take(),
            size: self.at,
            blake3: self.hasher.finalize().to_hex().to_string(),
        })
    }
}

/// An ETag that stands for the exact bytes of a file. Weak ones (`W/`) do not, so that a range could be of another version.
fn strong(etag: Option<&str>) -> Option<&str> {
    etag.filter(|etag| !etag.starts_with("W/"))
}
