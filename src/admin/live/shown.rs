//! The rendered state, in pieces that carry the version of their last change.

use std::{collections::HashMap, fmt::Write as _, sync::Arc};

use serde::Serialize;

use super::samples::Samples;
use crate::{admin::RouteStatus, admission::Gate, coldstart::ColdStarts, domain::RouteKey};

/// Number of completed cold starts shown.
const MAX_COLD_STARTS: usize = 50;

/// Rendered state at one moment.
#[derive(Default)]
pub(in crate::admin) struct RenderedState {
    version: u64,
    about: String,
    /// Names of all routes, in order.
    names: Arc<JsonFragment>,
    routes: Vec<(RouteKey, Arc<JsonFragment>)>,
    /// Newest first.
    cold_starts: Vec<Arc<JsonFragment>>,
    /// Held requests in the last second as JSON, without routes that have none.
    held: String,
}

/// State of the whole proxy.
#[derive(Serialize)]
pub(super) struct About {
    pub(super) version: &'static str,
    /// Name of this replica.
    pub(super) instance: Arc<str>,
    pub(super) uptime_ms: u64,
    /// Current time of this machine in milliseconds since 1970, the clock of all records.
    pub(super) now_ms: u64,
    /// Port of the API.
    pub(super) port: u16,
    /// A model to use in examples.
    pub(super) model: Option<String>,
    /// True during shutdown.
    pub(super) draining: bool,
    /// True while the routes of the cluster are unknown.
    pub(super) awaits_routes: bool,
    /// Number of samples taken of each route.
    pub(super) tick: u64,
    /// Number of other replicas by state.
    #[serde(serialize_with = "as_map")]
    pub(super) peers: Vec<(&'static str, usize)>,
}

/// Part of the state that is sent again when it changes.
#[derive(Default)]
struct JsonFragment {
    json: String,
    /// Version of its last change.
    since: u64,
}

/// Renders successive states.
#[derive(Default)]
pub(super) struct StateRenderer {
    version: u64,
    names: Arc<JsonFragment>,
    routes: HashMap<RouteKey, Arc<JsonFragment>>,
    cold_starts: HashMap<u64, Arc<JsonFragment>>,
}

// === impl StateRenderer ===

impl StateRenderer {
    /// Renders the current state.
    pub(super) fn make(
        &mut self,
        about: About,
        gates: &[Arc<Gate>],
        cold_starts: &ColdStarts,
        samples: &Samples,
    ) -> RenderedState {
        self.version += 1;
        let version = self.version;
        let names: Vec<_> = gates.iter().map(|gate| gate.key()).collect();
        self.names = JsonFragment::next(Some(&self.names), json(&names), version);

        let routes = gates.iter().map(|gate| {
            let piece =
                JsonFragment::next(self.routes.get(gate.key()), json(&RouteStatus::of(gate)), version);
            (gate.key().clone(), piece)
        });
        let routes: Vec<_> = routes.collect();
        self.routes = routes.iter().cloned().collect();

        let recent = cold_starts.recent(None, MAX_COLD_STARTS).into_iter().map(|cold_start| {
            let piece = JsonFragment::next(self.cold_starts.get(&cold_start.id), json(&cold_start), version);
            (cold_start.id, piece)
        });
        let recent: Vec<_> = recent.collect();
        self.cold_starts = recent.iter().cloned().collect();

        let held =
            gates.iter().map(|gate| (gate.key(), samples.last(gate.key()))).filter(|(_, held)| *held > 0);
        RenderedState {
            version,
            about: json(&about),
            names: self.names.clone(),
            routes,
            cold_starts: recent.into_iter().map(|(_, piece)| piece).collect(),
            held: json(&held.collect::<HashMap<_, _>>()),
        }
    }
}

// === impl JsonFragment ===

impl JsonFragment {
    /// Returns the same piece if it is unchanged.
    fn next(before: Option<&Arc<Self>>, json: String, version: u64) -> Arc<Self> {
        match before {
            Some(before) if before.json == json => before.clone(),
            _ => Arc::new(Self { json, since: version }),
        }
    }
}

// === impl RenderedState ===

impl RenderedState {
    /// Returns the version, which increases with every state.
    pub(in crate::admin) const fn version(&self) -> u64 {
        self.version
    }

    /// Formats the full state as an event.
    pub(super) fn snapshot(&self, samples: &Samples) -> String {
        let history = self.routes.iter().map(|(name, _)| (name, samples.of(name).collect::<Vec<_>>()));
        self.event("snapshot", 0, &json(&history.collect::<HashMap<_, _>>()))
    }

    /// Formats the changes since version `seen` as an event.
    pub(super) fn update(&self, seen: u64) -> String {
        self.event("update", seen, &self.held)
    }

    fn event(&self, name: &str, seen: u64, held: &str) -> String {
        let is_new = |piece: &&Arc<JsonFragment>| piece.since > seen;
        let list = |pieces: &mut dyn Iterator<Item = &Arc<JsonFragment>>| {
            pieces.map(|piece| piece.json.as_str()).collect::<Vec<_>>().join(",")
        };
        let routes = list(&mut self.routes.iter().map(|(_, piece)| piece).filter(is_new));
        let cold_starts = list(&mut self.cold_starts.iter().filter(is_new));
        let about = &self.about;
        // JSON escapes line breaks, so one `data` line suffices.
        let mut event = format!(
            r#"event: {name}
data: {{"about":{about},"routes":[{routes}],"cold_starts":[{cold_starts}],"held":{held}"#
        );
        if is_new(&&self.names) {
            let _ = write!(event, r#","names":{}"#, self.names.json);
        }
        event.push_str("}\n\n");
        event
    }
}

/// Serializes one of our types, whose keys are all strings.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| unreachable!("our own types are JSON: {error}"))
}

fn as_map<S: serde::Serializer>(pairs: &[(&'static str, usize)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().copied())
}
