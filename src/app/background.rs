//! Low-priority runtime for the cluster.
//!
//! A cluster may have thousands of routes and thousands of changes per second. On a machine whose cores are busy with
//! requests, this work gets about a tenth of a core, and idle cores without limit.

use std::io;

use rustix::{process::setpriority_process, thread::gettid};
use tokio::runtime::{Builder, Handle, Runtime};

/// A multi-threaded runtime at low priority. Dropping it aborts its tasks.
pub(super) struct BackgroundRuntime(Option<Runtime>);

/// Niceness: weight 110, where a worker thread has 1024 (`sched_prio_to_weight` in the kernel).
const NICE: i32 = 10;
/// Number of threads: a scan of all routes must not delay updates of endpoints.
const THREADS: usize = 2;

// === impl BackgroundRuntime ===

impl BackgroundRuntime {
    pub(super) fn new() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("cluster")
            .on_thread_start(lower_priority)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    pub(super) fn handle(&self) -> Option<&Handle> {
        self.0.as_ref().map(Runtime::handle)
    }
}

impl Drop for BackgroundRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Blocking on its threads would panic in an async context.
            runtime.shutdown_background();
        }
    }
}

/// Lowers the priority of this thread; on Linux, niceness is per thread, unlike in POSIX.
fn lower_priority() {
    if let Err(error) = setpriority_process(Some(gettid()), NICE) {
        tracing::debug!(%error, "cannot lower the priority of threads that watch the cluster");
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::getpriority_process;

    use super::*;

    #[tokio::test]
    async fn only_background_threads_are_niced() {
        let before = getpriority_process(Some(gettid())).unwrap();
        let background = BackgroundRuntime::new().unwrap();
        let there = async { getpriority_process(Some(gettid())).unwrap() };
        assert_eq!(background.handle().unwrap().spawn(there).await.unwrap(), NICE);
        assert_eq!(getpriority_process(Some(gettid())).unwrap(), before);
    }
}
