//! `pipe:COMMAND`, as in WebDataset: the output of a shell command is a shard.

use super::answer::{Answer, Body, Failure, Limits};
use std::{
    io::{ErrorKind, Read},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    thread,
};

/// Bytes of a read.
const CHUNK: usize = 64 << 10;
/// Reads that may wait for the writer.
const QUEUE: usize = 16;
const HINT: &str = "run the command by hand, and see what it wrote to stderr";

/// A running command; it is ended when this is dropped.
struct Running {
    child: Child,
    chunks: Receiver<std::io::Result<Vec<u8>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail if the command has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a command with `sh -c`. Its stderr is that of this process.
///
/// # Errors
/// The command cannot be started. Reading fails if it ends with another code than 0, or stalls.
pub fn open(command: &str, limits: &Limits) -> Result<Answer, Failure> {
    let spawned = Command::new("sh").args(["-c", command]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|e| Failure::permanent(format_args!("cannot start sh: {e}"), HINT))?;
    let (sender, chunks) = sync_channel(QUEUE);
    let output = child.stdout.take();
    thread::spawn(move || {
        let Some(mut output) = output else { return };
        loop {
            let mut chunk = vec![0; CHUNK];
            let read = match output.read(&mut chunk) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                read => read.map(|count| {
                    chunk.truncate(count);
                    chunk
                }),
            };
            let last = read.as_ref().map_or(true, Vec::is_empty);
            if sender.send(read).is_err() || last {
                return;
            }
        }
    });
    let stall = limits.stall;
    let mut running = Running { child, chunks };
    let read = move |buffer: &mut Vec<u8>| {
        buffer.clear();
        match running.chunks.recv_timeout(stall) {
            Ok(Ok(chunk)) if chunk.is_empty() => ended(&mut running.child).map(|()| false),
            Ok(Ok(chunk)) => {
                *buffer = chunk;
                Ok(true)
            }
            Ok(Err(e)) => Err(Failure::permanent(format_args!("cannot read the command's output: {e}"), HINT)),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = stall.as_secs_f64();
                Err(Failure::permanent(format_args!("the command wrote nothing for {seconds} s"), HINT))
            }
            Err(RecvTimeoutError::Disconnected) => ended(&mut running.child).map(|()| false),
        }
    };
    Ok(Answer::Body(Body { start: 0, size: None, etag: None, read: Box::new(read) }))
}

/// Waits for the end of a command that has closed its output.
fn ended(child: &mut Child) -> Result<(), Failure> {
    match child.wait() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::permanent(format_args!("the command failed ({status})"), HINT)),
        Err(e) => Err(Failure::permanent(format_args!("cannot wait for the command: {e}"), HINT)),
    }
}
