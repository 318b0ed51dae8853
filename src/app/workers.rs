//! Worker threads, each with its own runtime, listener and upstream connections.

use std::{hint::black_box, sync::Arc, thread, time::Duration};

use tokio::{net::TcpListener, runtime, time::interval};
use tokio_util::task::TaskTracker;

use crate::{
    drain::Drain,
    proxy::{Proxy, Shared, serve_listener},
    telemetry,
    upstream::Dialer,
};

/// Interval between sweeps for idle upstream connections.
const SWEEP_INTERVAL: Duration = Duration::from_secs(2);

/// Tasks run between polls for I/O events. When many held requests are released, each first opens a connection, which
/// takes tens of microseconds: with tokio's default of 61, the first of them waits 2 ms before its connect is noticed.
const EVENT_INTERVAL: u32 = 8;

/// Tasks run between polls of the global queue, which has the tasks woken by other threads: requests released by a
/// probe or another worker. With tokio's default of 31, a busy thread runs hundreds of local tasks before such a
/// task.
const GLOBAL_QUEUE_INTERVAL: u32 = 2;

/// The running threads.
pub(super) struct Workers(Vec<thread::JoinHandle<()>>);

impl Workers {
    /// Starts one thread per listener. Connections are tracked in `tasks`.
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
                run_worker(listener, &shared, &drain, &tasks);
            };
            thread::Builder::new().name(format!("worker-{index}")).spawn(run)
        });
        // Failing to spawn a thread at startup is fatal; no request is lost yet.
        Self(threads.map(|thread| thread.expect("a thread can be started")).collect())
    }

    /// Waits until all threads have ended.
    pub(super) async fn join(self) {
        let _ = tokio::task::spawn_blocking(move || {
            for thread in self.0 {
                let _ = thread.join();
            }
        })
        .await;
    }
}

fn run_worker(listener: std::net::TcpListener, shared: &Arc<Shared>, drain: &Drain, tasks: &TaskTracker) {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(EVENT_INTERVAL)
        .global_queue_interval(GLOBAL_QUEUE_INTERVAL)
        .build()
        .expect("a runtime can be built");
    runtime.block_on(async {
        let proxy = Proxy::new(shared.clone(), Dialer::Tcp);
        let listener = TcpListener::from_std(listener).expect("a bound socket is a listener");
        let closing = drain.closing.child_token();
        let serving = serve_listener(listener, proxy.clone(), closing, tasks.clone());
        let sweeping = async {
            let mut ticks = interval(SWEEP_INTERVAL);
            loop {
                ticks.tick().await;
                proxy.sweep();
                return_freed_memory();
            }
        };
        tokio::select! {
            // Connections outlive the listener until the cut.
            biased;
            () = drain.cut.cancelled() => {}
            () = sweeping => {}
            () = async { serving.await; std::future::pending::<()>().await } => {}
        }
    });
    // Dropping the remaining requests records their outcomes.
    runtime.shutdown_background();
}

/// Makes mimalloc return freed memory to the system. It does so one second after a free but has no timer: it checks on
/// large frees of this thread. Without this, an idle thread keeps all memory of its last peak.
fn return_freed_memory() {
    /// Above the sizes that mimalloc caches (`MI_LARGE_MAX_OBJ_SIZE` of version 3 is 512 KiB).
    const LARGE_BYTES: usize = 1 << 20;
    drop(black_box(Vec::<u8>::with_capacity(LARGE_BYTES)));
}
