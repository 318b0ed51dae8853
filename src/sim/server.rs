//! Shared state.

use super::{SimArgs, api::store::ResponseStore, boot::LogSink, engine::Engine};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64},
};
use tokio_util::sync::CancellationToken;

/// State shared by all connections.
pub(super) struct SimServer {
    pub(super) args: SimArgs,
    pub(super) log: LogSink,
    pub(super) engine: Arc<Engine>,
    pub(super) store: ResponseStore,
    pub(super) ready: AtomicBool,
    pub(super) sequence: AtomicU64,
    /// Crashes the server, for `--exit-after`.
    pub(super) crash: CancellationToken,
    /// Stops connections from accepting further requests.
    pub(super) drain: CancellationToken,
    /// Closes connections immediately.
    pub(super) abort: CancellationToken,
}

// === impl SimServer ===

impl SimServer {
    pub(super) fn new(args: SimArgs, log: LogSink) -> Self {
        Self {
            log,
            engine: Arc::new(Engine::new(&args)),
            store: ResponseStore::default(),
            ready: AtomicBool::new(false),
            sequence: AtomicU64::new(0),
            crash: CancellationToken::new(),
            drain: CancellationToken::new(),
            abort: CancellationToken::new(),
            args,
        }
    }
}
