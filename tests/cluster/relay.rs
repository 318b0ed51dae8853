//! A load balancer or NAT between a replica of Anteroom and the apiserver, which may forget connections.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

use crate::plane;

/// Forwards connections to the apiserver. Dropping it closes them.
pub(crate) struct TcpRelay {
    state: watch::Sender<RelayState>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Clone, Copy, Default)]
struct RelayState {
    /// Number of times that all connections have been forgotten.
    forgotten: u64,
    /// New connections are accepted, but not forwarded.
    deaf: bool,
}

// === impl TcpRelay ===

impl TcpRelay {
    pub(crate) async fn start(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let state = watch::Sender::default();
        let task = tokio::spawn(serve(listener, state.clone()));
        Self { state, _task: AbortOnDropHandle::new(task) }
    }

    /// Forgets all existing connections: they stay open, but nothing is forwarded any more. New ones work.
    pub(crate) fn forget(&self) {
        self.state.send_modify(|state| state.forgotten += 1);
    }

    /// Stops or resumes forwarding of new connections, which are accepted either way; existing ones continue.
    pub(crate) fn set_deaf(&self, deaf: bool) {
        self.state.send_modify(|state| state.deaf = deaf);
    }
}

async fn serve(listener: TcpListener, state: watch::Sender<RelayState>) {
    // The forwarding tasks end with this task.
    let mut forwarding = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        forwarding.spawn(forward(client, state.subscribe()));
    }
}

async fn forward(mut client: TcpStream, mut state: watch::Receiver<RelayState>) {
    let now = *state.borrow_and_update();
    let mut server = None;
    let forwarding = async {
        if now.deaf {
            return std::future::pending().await;
        }
        if let Ok(found) = TcpStream::connect((plane::ADDRESS, plane::PORT)).await {
            let _ = copy_bidirectional(&mut client, server.insert(found)).await;
        }
    };
    let forgotten = async {
        let _ = state.wait_for(|state| state.forgotten != now.forgotten).await;
    };
    tokio::select! {
        biased; // A forgotten connection must not forward anything.
        () = forgotten => {}
        () = forwarding => return,
    }
    // Keeps both ends open without forwarding.
    std::future::pending::<()>().await;
}
