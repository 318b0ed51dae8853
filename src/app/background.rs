//! Where the cluster is followed: threads that give way to those that serve requests.
//!
//! A cluster says as much as it likes: thousands of routes, and thousands of changes a second. On a machine whose cores
//! are all busy with requests, that work gets what is left of a core and a tenth of it; elsewhere it is as fast as any.

use std::io;

use rustix::{process::setpriority_process, thread::gettid};
use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime at a lower priority. Dropping it ends what is left in it.
pub(super) struct Background(Option<Runtime>);

/// Weight 110, where a thread that serves requests has 1024 (`sched_prio_to_weight` in the kernel).
const NICE: i32 = 10;
/// One that looks at all routes must not keep news of one endpoint from the other.
const THREADS: usize = 2;

// === impl Background ===

impl Background {
    pub(super) fn new() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("cluster")
            .on_thread_start(give_way)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    pub(super) fn handle(&self) -> Option<&Handle> {
        self.0.as_ref().map(Runtime::handle)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Its threads may not be waited for in a task.
            runtime.shutdown_background();
        }
    }
}

/// Lowers the priority of this thread: in Linux it is one of each thread, whatever POSIX says.
fn give_way() {
    if let Err(error) = setpriority_process(Some(gettid()), NICE) {
        tracing::debug!(%error, "the threads that follow the cluster have the priority of all others");
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::getpriority_process;

    use super::*;

    #[tokio::test]
    async fn only_its_own_threads_give_way() {
        let before = getpriority_process(Some(gettid())).unwrap();
        let background = Background::new().unwrap();
        let there = async { getpriority_process(Some(gettid())).unwrap() };
        assert_eq!(background.handle().unwrap().spawn(there).await.unwrap(), NICE);
        assert_eq!(getpriority_process(Some(gettid())).unwrap(), before);
    }
}
