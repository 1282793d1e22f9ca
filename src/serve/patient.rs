//! A connection that waits for a slow client, but not without end.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};

/// Maximum time in which a client reads nothing of what is sent to it.
const WRITE_TIME: Duration = Duration::from_secs(30);
/// How long, and how many bytes, are still read after the last response. If a connection with unread bytes is closed, the
/// system resets it, and the client may lose the response that says why.
const LINGER_TIME: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 20;

/// A TCP connection with these limits.
pub struct Patient {
    stream: TcpStream,
    /// Runs while the client reads nothing.
    writing: Option<Pin<Box<Sleep>>>,
    /// Runs since the last response.
    closing: Option<Pin<Box<Sleep>>>,
    drained: usize,
}

impl Patient {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, writing: None, closing: None, drained: 0 }
    }

    /// The result of a write, or an error where the client has read nothing for too long.
    fn written<T>(&mut self, result: Poll<io::Result<T>>, cx: &mut Context) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.writing = None;
            return result;
        }
        let timer = self.writing.get_or_insert_with(|| Box::pin(sleep(WRITE_TIME)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context, buffer: &mut ReadBuf) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(written, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        if self.closing.is_none() {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        }
        let timer = self.closing.get_or_insert_with(|| Box::pin(sleep(LINGER_TIME)));
        if timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let mut scratch = [0; 16 << 10];
        loop {
            let mut buffer = ReadBuf::new(&mut scratch);
            let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer));
            let count = buffer.filled().len();
            self.drained += count;
            if read.is_err() || count == 0 || self.drained > LINGER_BYTES {
                return Poll::Ready(Ok(()));
            }
        }
    }
}
