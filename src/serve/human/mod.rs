//! The raters' pages of a study of human evaluation.
//!
//! A rater's link has a token; everything below it belongs to that rater. Paths have the token, the number of a page in the
//! rater's order, and the place of an output on it: nothing that tells the system, and nothing that becomes a file name.
//! Texts and images come from the study file, style and script from the program.

mod answers;
mod html;
mod pages;
mod routes;
mod texts;

use crate::{
    error::{Error, Exit, Result, stopped},
    eval::human::study::Study,
    serve::{listen, signals},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};

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
    let listener = listen::bind(address, hint).await?;
    let signal = signals::next()?;
    announce(&study, listener.local_addr()?)?;
    let app = Arc::new(routes::App::new(study));
    let mut came = 0;
    let stop = async { came = signal.await.unwrap_or_default() };
    // Whoever is still sending after that has nothing stored.
    listen::serve(listener, routes::router(app.clone()), stop, (PATIENCE, || {}, Duration::ZERO)).await;
    app.end_serving();
    Err(stopped_by(came))
}

fn stopped_by(signal: i32) -> Error {
    let (name, exit) = match signal {
        signal_hook::consts::SIGINT => ("Ctrl-C", Exit::Interrupted),
        signal_hook::consts::SIGHUP => ("SIGHUP", Exit::Requeue),
        _ => ("SIGTERM", Exit::Requeue),
    };
    stopped(format_args!("stopped by {name}; all ratings are saved"), "the same command goes on from here", exit)
}
