//! Replicas tell each other their demand, so that each can answer a scaler for all.
//!
//! Each one follows every other one. What it hears goes into the gates of its routes, which is all that an answer reads:
//! no peer, however sick, is asked or waited for.

mod board;
mod follow;
mod network;
mod report;
mod token;

/// The protocol, as generated from `proto/peers.proto`.
#[allow(missing_docs, reason = "generated")]
pub mod proto {
    tonic::include_proto!("anteroom.peers.v1");
}

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    admission::Directory,
    config::{self, budget::PEER_REPLICAS},
    grpc::GrpcListener,
};
use board::Board;
pub use board::PeerState;
use follow::Following;
use network::Dns;
use token::Token;

/// This replica among its peers.
pub struct Peers {
    board: Arc<Board>,
    routes: Arc<Directory>,
    config: config::Peers,
    token: Option<Arc<Token>>,
}

/// How many other replicas there may be.
const REPLICAS: usize = PEER_REPLICAS;

/// How many routes one report may have; the rest follows in the next ones, 20 ms apart.
const ROUTES: usize = 500;

/// How large a report may be, in bytes: 2,000 routes, as the release before sends at once, with the longest names there are.
const REPORT: usize = 1 << 20;

/// How long connections have to end in order.
const GRACE: Duration = Duration::from_secs(1);

// === impl Peers ===

impl Peers {
    /// A replica with these routes. It gets a name that no other one has.
    pub fn new(routes: Arc<Directory>, config: config::Peers) -> Self {
        let id = format!("{:016x}", fastrand::u64(..));
        let unreachable_timeout = config.unreachable_timeout.get();
        let board = Board::new(id, routes.clone(), config.timeout.get(), unreachable_timeout);
        let token = config.token_file.as_ref().map(|path| Arc::new(Token::new(path)));
        Self { board: Arc::new(board), routes, config, token }
    }

    /// How many other replicas are in each state.
    pub fn states(&self) -> [(PeerState, usize); 4] {
        self.board.states()
    }

    /// Answers other replicas and follows them until `stopping`; then says goodbye.
    pub async fn run(&self, listener: GrpcListener, stopping: CancellationToken) {
        let (service, id) = (self.config.service.clone(), self.board.id());
        let network = Arc::new(Dns::new(service, id.to_owned(), self.token.clone()));
        let (routes, token) = (self.routes.clone(), self.token.clone());
        let answering = report::serve(listener, id, routes, token, stopping.clone());
        let following = async {
            tokio::select! {
                // The end first: what is heard then changes nothing any more.
                biased;
                () = stopping.cancelled() => {}
                () = Following::new(self.board.clone(), network).run() => {}
            }
        };
        let cut = async {
            stopping.cancelled().await;
            tokio::time::sleep(GRACE).await;
        };
        tokio::select! {
            // In order, if it is in time.
            biased;
            ((), ()) = async { tokio::join!(answering, following) } => {}
            () = cut => {}
        }
    }
}

#[cfg(test)]
mod tests;
