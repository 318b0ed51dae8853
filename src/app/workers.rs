//! The threads that serve requests: each with a runtime, a listener and connections to endpoints of its own.

use std::{sync::Arc, thread, time::Duration};

use tokio::{net::TcpListener, runtime, time::interval};
use tokio_util::task::TaskTracker;

use crate::{
    drain::Drain,
    proxy::{Proxy, Shared, serve_listener},
    telemetry,
    upstream::Dialer,
};

/// How often connections to endpoints are looked through for idle ones.
const SWEEP: Duration = Duration::from_secs(2);

/// How many tasks run before sockets are looked at again. When many held requests are released, each opens a connection
/// first, which takes tens of microseconds: with tokio's 61 the first one had to wait for two milliseconds of that before
/// anybody saw that it was connected.
const TURN: u32 = 16;

/// The running threads.
pub(super) struct Workers(Vec<thread::JoinHandle<()>>);

impl Workers {
    /// Starts a thread for each listener. Connections are tracked in `tasks`.
    pub(super) fn start(
        listeners: Vec<std::net::TcpListener>,
        shared: &Arc<Shared>,
        drain: &Drain,
        tasks: &TaskTracker,
    ) -> Self {
        let threads = listeners.into_iter().enumerate().map(|(index, listener)| {
            let (shared, drain, tasks) = (shared.clone(), drain.clone(), tasks.clone());
            let run = move || {
                telemetry::count_as_worker(index);
                work(listener, &shared, &drain, &tasks);
            };
            thread::Builder::new().name(format!("worker-{index}")).spawn(run)
        });
        // A thread that cannot be started at the start is the end: there is nothing to lose yet.
        Self(threads.map(|thread| thread.expect("a thread can be started")).collect())
    }

    /// Waits until all have ended.
    pub(super) async fn join(self) {
        let _ = tokio::task::spawn_blocking(move || {
            for thread in self.0 {
                let _ = thread.join();
            }
        })
        .await;
    }
}

fn work(listener: std::net::TcpListener, shared: &Arc<Shared>, drain: &Drain, tasks: &TaskTracker) {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(TURN)
        .build()
        .expect("a runtime can be built");
    runtime.block_on(async {
        let proxy = Proxy::new(shared.clone(), Dialer::Tcp);
        let listener = TcpListener::from_std(listener).expect("a bound socket is a listener");
        let closing = drain.closing.child_token();
        let serving = serve_listener(listener, proxy.clone(), closing, tasks.clone());
        let sweeping = async {
            let mut ticks = interval(SWEEP);
            loop {
                ticks.tick().await;
                proxy.sweep();
            }
        };
        tokio::select! {
            // The cut comes last, and until then connections live on after the listener.
            biased;
            () = drain.cut.cancelled() => {}
            () = sweeping => {}
            () = async { serving.await; std::future::pending::<()>().await } => {}
        }
    });
    // What is left is dropped, and thereby counted.
    runtime.shutdown_background();
}
