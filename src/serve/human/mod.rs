//! The raters' pages of a study of human evaluation.
//!
//! A rater's link has a token; everything below it belongs to that rater. Paths have the token, the number of a page in the
//! rater's order, and the place of an output on it: nothing that tells the system, and nothing that becomes a file name.
//! Texts and images come from the study file, style and script from the program.

mod answers;
mod html;
mod pages;
mod routes;
mod signals;
mod texts;

use crate::{
    error::{Error, Exit, Hint, Result, stopped},
    eval::human::study::Study,
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::Notify};

/// How long requests in progress may take when the server stops.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves a study until a signal comes. `announce` gets the address, which has the chosen port where `address` has port 0.
///
/// # Errors
/// The address cannot be used, or a signal stopped the server: Ctrl-C has exit code 130; SIGTERM and SIGHUP have 75, since
/// the same command goes on.
pub fn run(study: Study, address: SocketAddr, announce: impl FnOnce(&Study, SocketAddr) -> Result<()>) -> Result<()> {
    study.begin_serving()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(study, address, announce))
}

async fn serve(
    study: Study,
    address: SocketAddr,
    announce: impl FnOnce(&Study, SocketAddr) -> Result<()>,
) -> Result<()> {
    let hint = "choose another one with --address, such as 127.0.0.1:0 for any free port";
    let listener = TcpListener::bind(address).await.hint(format_args!("cannot listen on {address}"), hint)?;
    let signal = signals::next()?;
    announce(&study, listener.local_addr()?)?;
    let (app, stop) = (Arc::new(routes::App::new(study)), Arc::new(Notify::new()));
    let server = axum::serve(listener, routes::router(app.clone()));
    let server = tokio::spawn(server.with_graceful_shutdown(stop.clone().notified_owned()).into_future());
    let signal = signal.await.unwrap_or_default();
    stop.notify_one();
    // Whoever is still sending then has nothing stored.
    let _ = tokio::time::timeout(PATIENCE, server).await;
    app.end_serving();
    Err(stopped_by(signal))
}

fn stopped_by(signal: i32) -> Error {
    let (name, exit) = match signal {
        signal_hook::consts::SIGINT => ("Ctrl-C", Exit::Interrupted),
        signal_hook::consts::SIGHUP => ("SIGHUP", Exit::Requeue),
        _ => ("SIGTERM", Exit::Requeue),
    };
    stopped(format_args!("stopped by {name}; all ratings are saved"), "the same command goes on from here", exit)
}
