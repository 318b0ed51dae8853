//! Reports of this replica to the others.

use std::{collections::HashMap, pin::Pin, sync::Arc, time::Duration};

use futures_util::stream::{self, StreamExt as _, unfold};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

use super::{
    board::BoardEntry,
    proto::{
        Report, RouteDemand, WatchRequest,
        peers_server::{Peers, PeersServer},
    },
    token::TokenFile,
};
use crate::{
    admission::{Directory, Gate, Gates},
    config::budget::{GRPC_MESSAGE_BYTES, PEER_STREAMS},
    demand::Counts,
    domain::RouteKey,
    grpc::{Caller, GrpcListener, StreamPlace},
    places::Places,
};

/// Maximum number of routes per report; further ones follow in the next reports, 20 ms apart.
pub(super) const MAX_ROUTES_PER_REPORT: usize = 500;

/// Interval at which the counts of routes with demand are read. Bounds the rate of reports, besides edges.
const REPORT_COUNTS_INTERVAL: Duration = Duration::from_millis(20);

/// Interval of reports while nothing changes.
const REPORT_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of streams per source: a replica needs one, and replicas on one machine may share an address.
const STREAMS_PER_SOURCE: usize = 8;

/// Maximum number of calls under way per connection. A replica has one.
const MAX_PEER_CALLS_PER_CONNECTION: u32 = 64;

/// Reports to one other replica.
pub(super) struct Reports {
    id: Arc<str>,
    routes: Arc<Directory>,
    changes: watch::Receiver<Gates>,
    edges: watch::Receiver<u64>,
    last_reported: HashMap<RouteKey, BoardEntry>,
    /// First route that did not fit the last report. The next one starts there, so that every route gets its turn even
    /// if many change all the time.
    resume_at_route: Option<RouteKey>,
    /// Routes with demand at the last full scan. Demand of any other route starts with an edge, which triggers a full
    /// scan.
    active: Vec<Arc<Gate>>,
    /// Time of the next full scan, which is reported even if nothing has changed.
    next_full_scan: Instant,
    /// Time until which only edges are reported. Counts that change all the time would otherwise be sent without
    /// pause.
    next_count_scan: Instant,
    ending: CancellationToken,
}

struct ReportService {
    id: Arc<str>,
    routes: Arc<Directory>,
    /// Places of the streams of other replicas.
    streams: Arc<Places>,
    token: Option<Arc<TokenFile>>,
    ending: CancellationToken,
}

/// Serves reports to other replicas until `ending`.
pub(super) async fn serve(
    listener: GrpcListener,
    id: &str,
    routes: Arc<Directory>,
    token: Option<Arc<TokenFile>>,
    ending: CancellationToken,
) {
    let answering = ReportService {
        id: id.into(),
        routes,
        // A replica may reconnect before its former connection is known to be dead.
        streams: Places::new(PEER_STREAMS, STREAMS_PER_SOURCE),
        token,
        ending: ending.clone(),
    };
    let service = PeersServer::new(answering).max_decoding_message_size(GRPC_MESSAGE_BYTES);
    listener.serve(Routes::new(service), MAX_PEER_CALLS_PER_CONNECTION, ending).await;
}

#[tonic::async_trait]
impl Peers for ReportService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Report, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.token.iter().try_for_each(|token| token.authenticate_call(&request))?;
        tracing::debug!(replica = request.get_ref().replica, "a replica follows this one");
        let (caller, ending) = (Caller::of(request.extensions()), self.ending.child_token());
        let place = StreamPlace::new(self.streams.enter(caller.source(), ending.clone()), &caller);
        let reports = Reports::new(self.id.clone(), self.routes.clone(), ending.clone());
        // A clean end means that this replica stops, so an evicted stream ends with an error.
        let (evicted, stopping) = (ending, self.ending.clone());
        let end = stream::iter(std::iter::once_with(move || {
            (evicted.is_cancelled() && !stopping.is_cancelled())
                .then(|| Err(Status::resource_exhausted("another stream was given the place of this one")))
        }));
        let reports = reports.stream(Some(place)).chain(end.filter_map(std::future::ready));
        Ok(Response::new(Box::pin(reports)))
    }
}

// === impl Reports ===

impl Reports {
    pub(super) fn new(id: Arc<str>, routes: Arc<Directory>, ending: CancellationToken) -> Self {
        Self {
            id,
            changes: routes.changes(),
            edges: routes.edges(),
            routes,
            last_reported: HashMap::new(),
            resume_at_route: None,
            active: Vec::new(),
            next_full_scan: Instant::now(),
            next_count_scan: Instant::now(),
            ending,
        }
    }

    /// Returns the stream of reports. The next report is requested only when the last one is on its way, so a slow
    /// reader costs nothing: each report contains the counts of its time.
    pub(super) fn stream(
        self,
        place: Option<StreamPlace>,
    ) -> impl Stream<Item = Result<Report, Status>> + Send {
        unfold((self, place), |(mut reports, place)| async {
            let report = reports.next().await?;
            Some((Ok(report), (reports, place)))
        })
    }

    /// Waits for the next report. Returns `None` once the stream must end. Cancel-safe.
    async fn next(&mut self) -> Option<Report> {
        loop {
            let now = Instant::now();
            let all = now >= self.next_full_scan
                || self.edges.has_changed().unwrap_or(true)
                || self.changes.has_changed().unwrap_or(true);
            if all || now >= self.next_count_scan {
                let routes = if all { self.scan_all_routes() } else { self.scan_active_routes() };
                self.next_count_scan = now + REPORT_COUNTS_INTERVAL;
                if !routes.is_empty() || now >= self.next_full_scan {
                    // A report of maximum size may lack routes, which follow soon.
                    self.next_full_scan = now
                        + if routes.len() < MAX_ROUTES_PER_REPORT {
                            REPORT_HEARTBEAT_INTERVAL
                        } else {
                            REPORT_COUNTS_INTERVAL
                        };
                    return Some(Report { replica: self.id.to_string(), routes });
                }
            }
            let look = if self.active.is_empty() {
                self.next_full_scan
            } else {
                self.next_full_scan.min(self.next_count_scan)
            };
            tokio::select! {
                // Shutdown first, or a busy route would keep the stream open.
                biased;
                () = self.ending.cancelled() => return None,
                Ok(()) = self.edges.changed() => self.edges.mark_changed(),
                Ok(()) = self.changes.changed() => self.changes.mark_changed(),
                () = sleep_until(look) => {}
            }
        }
    }

    fn scan_all_routes(&mut self) -> Vec<RouteDemand> {
        // Later changes are left for the next scan.
        self.edges.mark_unchanged();
        self.changes.mark_unchanged();
        let gates = self.routes.gates();
        let mut changed = Vec::new();
        // Removed routes first: each is reported once, so they do not delay others for long.
        self.last_reported.retain(|route, _| {
            let gone = changed.len() < MAX_ROUTES_PER_REPORT && !gates.contains_key(route);
            if gone {
                changed.push(BoardEntry::default().of(route));
            }
            !gone
        });
        let mut active = std::mem::take(&mut self.active);
        active.clear();
        self.append_changed_routes(gates.values(), &mut changed, |gate, counts| {
            if counts.is_active() {
                active.push(gate.clone());
            }
        });
        self.active = active;
        changed
    }

    fn scan_active_routes(&mut self) -> Vec<RouteDemand> {
        let active = std::mem::take(&mut self.active);
        let mut changed = Vec::new();
        self.append_changed_routes(active.iter(), &mut changed, |_, _| {});
        self.active = active;
        changed
    }

    /// Adds the changed entries of these routes to `changed`, up to [`MAX_ROUTES_PER_REPORT`], in the order of their names.
    fn append_changed_routes<'a>(
        &mut self,
        gates: impl Iterator<Item = &'a Arc<Gate>> + Clone,
        changed: &mut Vec<RouteDemand>,
        mut seen: impl FnMut(&Arc<Gate>, Counts),
    ) {
        let first = self.resume_at_route.take();
        let is_later = |gate: &&Arc<Gate>| first.as_ref().is_none_or(|first| gate.key() >= first);
        let sooner = gates.clone().filter(|gate| !is_later(gate));
        for gate in gates.filter(is_later).chain(sooner) {
            let counts = gate.counts_or_mark_idle();
            seen(gate, counts);
            let entry = BoardEntry { counts, pushes: gate.demand().pushes() };
            if self.last_reported.get(gate.key()).copied().unwrap_or_default() == entry {
                continue;
            }
            if changed.len() < MAX_ROUTES_PER_REPORT {
                self.last_reported.insert(gate.key().clone(), entry);
                changed.push(entry.of(gate.key()));
            } else if self.resume_at_route.is_none() {
                self.resume_at_route = Some(gate.key().clone());
            }
        }
    }
}
