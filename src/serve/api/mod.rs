//! The server of a model: a page, OpenAI's images API, and captions, answers and scores.
//!
//! One thread, `worker`, owns the model. Requests go through a bounded queue (`work`), and images join the batch that is
//! running (continuous batching). Another thread serves the clients: `routes` has the paths, `guard` says who may ask,
//! `images` and `texts` read requests and write responses, `refusal` has the errors. No request names a file.

mod app;
mod body;
mod events;
mod guard;
mod images;
mod metrics;
mod refusal;
mod routes;
mod texts;
mod work;
mod worker;

pub use app::{ModelFacts, Settings};

use crate::{
    error::{Error, Exit, Result, anyhow, failed, stopped},
    generate::{Matching, Models},
    runtime,
    serve::{listen, signals},
};
use app::App;
use metrics::Metrics;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
use tokio::sync::oneshot;
use work::Queue;
use worker::Worker;

/// Time in which the responses of requests that were given up must be sent.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Threads for work that takes long, such as encoding images.
const BLOCKING: usize = 4;

/// A model for the server.
pub struct Loaded {
    pub models: Models,
    pub matching: Option<Matching>,
    pub facts: ModelFacts,
}

/// Serves a model until a signal comes. `load` runs in the model's thread, `announce` gets the address.
///
/// # Errors
/// The model cannot be loaded, the address cannot be used, the model's thread has failed, or Ctrl-C stopped the server
/// (exit code 130). SIGTERM and SIGHUP are no errors, if all requests in progress could be finished.
pub fn run(
    settings: Settings,
    load: impl FnOnce() -> Result<Loaded> + Send + 'static,
    announce: impl FnOnce(SocketAddr, &ModelFacts),
) -> Result<()> {
    let (metrics, abort) = (Arc::new(Metrics::default()), Arc::new(AtomicBool::new(false)));
    let (queue, works) = Queue::new(settings.queue, metrics.clone());
    let (send_facts, facts) = oneshot::channel();
    let (send_end, ended) = oneshot::channel();
    let (max_batch, counted, aborted) = (settings.max_batch, metrics.clone(), abort.clone());
    let work = move || {
        let work = move || -> Result<()> {
            let Loaded { models, matching, facts } = load()?;
            let worker = Worker::new(&models, matching.as_ref(), max_batch, counted, aborted)?;
            // The receiver is gone only if the server has failed.
            let _ = send_facts.send(facts);
            worker.run(&works)
        };
        let _ = send_end.send(runtime::on_threads(work));
    };
    let worker = thread::Builder::new().name("model".to_owned()).spawn(work)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING).build()?;
    let served = runtime.block_on(async {
        let Ok(facts) = facts.await else { return ended.await.unwrap_or_else(|_| Err(panicked())) };
        let app = App::new(settings, facts, queue, metrics);
        serve(Arc::new(app), ended, &abort, announce).await
    });
    // Without the last sender of the queue, the thread ends.
    drop(runtime);
    served.and(worker.join().map_err(|_| panicked()))
}

fn panicked() -> Error {
    failed("the model's thread has failed", "the lines above say why; start the server again")
}

async fn serve(
    app: Arc<App>,
    ended: oneshot::Receiver<Result<()>>,
    abort: &AtomicBool,
    announce: impl FnOnce(SocketAddr, &ModelFacts),
) -> Result<()> {
    let address = SocketAddr::new(app.settings.host, app.settings.port);
    let listener = listen::bind(address, "choose another port with --port; 0 is any free one").await?;
    let signal = signals::next()?;
    announce(listener.local_addr()?, &app.model);
    let (mut came, mut broken) = (0, None);
    let stop = async {
        tokio::select! {
            signal = signal => came = signal.unwrap_or_default(),
            ended = ended => broken = Some(ended.unwrap_or_else(|_| Err(panicked()))),
        }
    };
    let (router, grace) = (routes::router(app.clone()), app.settings.grace);
    // Requests that are not done by then get an error.
    let give_up = || abort.store(true, Ordering::SeqCst);
    let finished = listen::serve(listener, router, stop, (grace, give_up, LAST_WORDS)).await;
    match (broken, came) {
        (Some(ended), _) => ended.and(Err(anyhow!("the model's thread has ended"))),
        (None, signal_hook::consts::SIGINT) => {
            Err(stopped("stopped by Ctrl-C", "the same command starts the server again", Exit::Interrupted))
        }
        (None, _) if !finished => {
            let hint = "give them more time with --grace";
            Err(failed(format_args!("requests were not done within {} s and were given up", grace.as_secs()), hint))
        }
        _ => Ok(()),
    }
}
