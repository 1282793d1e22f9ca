//! Signals that end a server.

use crate::{
    error::{Exit, Hint, Result},
    report, runtime,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};
use std::thread;
use tokio::sync::oneshot::{self, Receiver};

/// The next signal among Ctrl-C, SIGTERM and SIGHUP. A second Ctrl-C ends the process at once.
///
/// # Errors
/// The system refuses a signal handler or a thread.
pub fn next() -> Result<Receiver<i32>> {
    let hangup = (!runtime::is_ignored(SIGHUP)).then_some(SIGHUP);
    let listen = || Signals::new([SIGINT, SIGTERM].into_iter().chain(hangup));
    let mut signals = listen().hint("cannot listen to signals", "try again")?;
    let (sender, receiver) = oneshot::channel();
    let work = move || {
        let mut sender = Some(sender);
        for signal in signals.forever() {
            match sender.take() {
                // The receiver is gone when the server has failed; the process then ends anyway.
                Some(sender) => drop(sender.send(signal)),
                None if signal == SIGINT => report::leave(Exit::Interrupted),
                None => {}
            }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(work)?;
    Ok(receiver)
}
