//! Access to other replicas.

use std::{io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use tokio_stream::Stream;
use tonic::{Request, Status, transport::Endpoint};

use super::{
    proto::{Report, WatchRequest, peers_client::PeersClient},
    token::TokenFile,
};

/// Reports of another replica.
pub(super) type ReportStream = Pin<Box<dyn Stream<Item = Result<Report, Status>> + Send>>;

/// Access to other replicas; simulated in tests.
pub(super) trait Network: Send + Sync + 'static {
    /// Resolves the addresses of all replicas, including this one.
    fn resolve(&self) -> impl Future<Output = io::Result<Vec<SocketAddr>>> + Send;
    /// Requests the reports of the replica at an address.
    fn watch(&self, address: SocketAddr) -> impl Future<Output = Result<ReportStream, Status>> + Send;
}

/// Access by a DNS name that resolves to all replicas.
pub(super) struct DnsNetwork {
    service: String,
    id: String,
    token: Option<Arc<TokenFile>>,
}

/// Maximum size of a report, in bytes: 2,000 routes with the longest names, which the previous release sends at once.
const MAX_REPORT_BYTES: usize = 1 << 20;

/// Timeout for connecting.
const PEER_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

// === impl DnsNetwork ===

impl DnsNetwork {
    /// `service`: `name:port`. `id`: id of this replica.
    pub(super) const fn new(service: String, id: String, token: Option<Arc<TokenFile>>) -> Self {
        Self { service, id, token }
    }
}

impl Network for DnsNetwork {
    async fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        Ok(tokio::net::lookup_host(&self.service).await?.collect())
    }

    async fn watch(&self, address: SocketAddr) -> Result<ReportStream, Status> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Status::internal(error.to_string()))?
            .connect_timeout(PEER_CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        let channel = endpoint.connect().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let mut client = PeersClient::new(channel).max_decoding_message_size(MAX_REPORT_BYTES);
        let mut call = Request::new(WatchRequest { replica: self.id.clone() });
        self.token.iter().for_each(|token| token.attach_token(&mut call));
        let reports = client.watch(call).await?.into_inner();
        Ok(Box::pin(reports))
    }
}
