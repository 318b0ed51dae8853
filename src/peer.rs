//! Exchange of demand between replicas, so that each of them can answer a scaler for all.
//!
//! Each replica follows every other one. Their reports are added up in the gates of its routes, and a response to a
//! scaler reads only these: it never waits for a peer.

mod board;
mod follow;
mod network;
#[allow(missing_docs, reason = "generated")]
pub mod proto;
mod report;
mod token;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{admission::Directory, config, grpc::GrpcListener};
use board::Board;
pub use board::PeerState;
use follow::Following;
use network::DnsNetwork;
use token::TokenFile;

/// This replica and its peers.
pub struct PeerGroup {
    board: Arc<Board>,
    routes: Arc<Directory>,
    config: config::Peers,
    token: Option<Arc<TokenFile>>,
}

/// Time for connections to end gracefully.
const PEER_SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

// === impl PeerGroup ===

impl PeerGroup {
    /// Creates a replica with these routes, and a unique id.
    pub fn new(routes: Arc<Directory>, config: config::Peers) -> Self {
        let id = format!("{:016x}", fastrand::u64(..));
        let unreachable_timeout = config.unreachable_timeout.get();
        let board = Board::new(id, routes.clone(), config.timeout.get(), unreachable_timeout);
        let token = config.token_file.as_ref().map(|path| Arc::new(TokenFile::new(path)));
        Self { board: Arc::new(board), routes, config, token }
    }

    /// Returns the number of other replicas in each state.
    pub fn states(&self) -> [(PeerState, usize); 4] {
        self.board.states()
    }

    /// Serves and follows other replicas until `stopping`, then ends its streams cleanly.
    pub async fn run(&self, listener: GrpcListener, stopping: CancellationToken) {
        let (service, id) = (self.config.service.clone(), self.board.id());
        let network = Arc::new(DnsNetwork::new(service, id.to_owned(), self.token.clone()));
        let (routes, token) = (self.routes.clone(), self.token.clone());
        let answering = report::serve(listener, id, routes, token, stopping.clone());
        let following = async {
            tokio::select! {
                // Shutdown first: later reports change nothing.
                biased;
                () = stopping.cancelled() => {}
                () = Following::new(self.board.clone(), network).run() => {}
            }
        };
        let cut = async {
            stopping.cancelled().await;
            tokio::time::sleep(PEER_SHUTDOWN_GRACE).await;
        };
        tokio::select! {
            // If connections end gracefully in time, that result takes precedence over the timeout.
            biased;
            ((), ()) = async { tokio::join!(answering, following) } => {}
            () = cut => {}
        }
    }
}

#[cfg(test)]
mod tests;
