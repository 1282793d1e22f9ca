//! Server-sent events.

use axum::body::Bytes;
use hyper::body::{Body, Frame};
use serde_json::Value;
use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::sync::mpsc::Receiver;

/// One event; JSON has no line breaks.
pub fn event(name: &str, data: &Value) -> String {
    format!("event: {name}\ndata: {data}\n\n")
}

/// A body whose bytes come from a channel, until that is closed.
pub struct Events {
    receiver: Receiver<Bytes>,
}

impl Events {
    pub fn new(receiver: Receiver<Bytes>) -> Self {
        Self { receiver }
    }
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.receiver.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}
