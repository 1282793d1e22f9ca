//! Connections: how many there may be, how long a client may take, and how they end.

use super::patient::Patient;
use crate::error::{Hint, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

/// Maximum number of connections; more wait until one ends.
const CONNECTIONS: u32 = 256;
/// Maximum time from the first byte of a request to the end of its headers, and of a connection between two requests.
const HEADER_TIME: Duration = Duration::from_secs(15);
/// Maximum size of the headers in bytes.
const HEADER_SIZE: usize = 32 << 10;
/// Pause after an error of the system, such as too many open files.
const PAUSE: Duration = Duration::from_millis(50);

/// Listens on an address.
///
/// # Errors
/// The address cannot be used; `hint` says how another one is chosen.
pub async fn bind(address: SocketAddr, hint: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.hint(format_args!("cannot listen on {address}"), hint)
}

/// Serves until `stop` is ready. Requests in progress then get `grace`; returns whether all have ended in this time. If not,
/// `give_up` is called, and their responses get `last`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    stop: impl Future<Output = ()>,
    (grace, give_up, last): (Duration, impl FnOnce(), Duration),
) -> bool {
    let (end, ends) = watch::channel(false);
    let places = Arc::new(Semaphore::new(CONNECTIONS as usize));
    let accept = async {
        // The semaphore is never closed.
        while let Ok(place) = places.clone().acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (router, ends) = (router.clone(), ends.clone());
                    tokio::spawn(async move {
                        connection(stream, router, ends).await;
                        drop(place);
                    });
                }
                Err(_) => sleep(PAUSE).await,
            }
        }
    };
    tokio::select! {
        () = accept => {}
        () = stop => {}
    }
    drop(listener);
    end.send_replace(true);
    let finished = timeout(grace, places.acquire_many(CONNECTIONS)).await.is_ok();
    if !finished {
        give_up();
        let _ = timeout(last, places.acquire_many(CONNECTIONS)).await;
    }
    finished
}

/// The requests of one connection. What ends it early (a client that is gone, or too slow) concerns only this client.
async fn connection(stream: TcpStream, router: Router, mut ends: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME).max_buf_size(HEADER_SIZE);
    let io = TokioIo::new(Patient::new(stream));
    let mut connection = pin!(server.serve_connection(io, TowerToHyperService::new(router)));
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = ends.wait_for(|ends| *ends) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}
