//! The threads that serve requests: each with a runtime, a listener and connections to endpoints of its own.

use std::{hint::black_box, sync::Arc, thread, time::Duration};

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
const TURN: u32 = 8;

/// Every so many tasks one goes first that another thread has woken: requests that are released by a probe or another
/// worker. With tokio's 31 they would come hundreds of places late while this thread has work of its own.
const OTHERS: u32 = 2;

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
        .global_queue_interval(OTHERS)
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
                give_memory_back();
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

/// mimalloc gives freed memory back to the system a second later, but has no timer of its own: it looks when this thread
/// frees something large. A thread that is idle after a storm would keep all that the storm took.
fn give_memory_back() {
    /// What mimalloc maps by itself (`MI_LARGE_MAX_OBJ_SIZE` of version 3 is 512 KiB).
    const LARGE: usize = 1 << 20;
    drop(black_box(Vec::<u8>::with_capacity(LARGE)));
}
