//! The state at one moment, in pieces that know since which version they are as they are.

use std::{collections::HashMap, fmt::Write as _, sync::Arc};

use serde::Serialize;

use super::samples::Samples;
use crate::{admin::RouteStatus, admission::Gate, coldstart::ColdStarts, domain::RouteKey};

/// How many cold starts that have ended are shown.
const COLD_STARTS: usize = 50;

/// The state at one moment.
#[derive(Default)]
pub(in crate::admin) struct Shown {
    version: u64,
    about: String,
    /// The names of all routes, in their order.
    names: Arc<Piece>,
    routes: Vec<(RouteKey, Arc<Piece>)>,
    /// Newest first.
    cold_starts: Vec<Arc<Piece>>,
    /// What was held in the last second, as JSON; routes with nothing are left out.
    held: String,
}

/// What is told of the whole proxy.
#[derive(Serialize)]
pub(super) struct About {
    pub(super) version: &'static str,
    /// The name of this replica.
    pub(super) instance: Arc<str>,
    pub(super) uptime_ms: u64,
    /// What time it is here, in milliseconds since 1970: times in records are by this clock.
    pub(super) now_ms: u64,
    /// The port where requests come in.
    pub(super) port: u16,
    /// A model that may be asked for.
    pub(super) model: Option<String>,
    /// Whether we are about to stop.
    pub(super) draining: bool,
    /// Whether the routes of the cluster are not known yet.
    pub(super) awaits_routes: bool,
    /// How many samples have been taken of each route.
    pub(super) tick: u64,
    /// How many other replicas are in each state.
    #[serde(serialize_with = "as_map")]
    pub(super) peers: Vec<(&'static str, usize)>,
}

/// Something that is told again when it has changed.
#[derive(Default)]
struct Piece {
    json: String,
    /// The version with which it came to be so.
    since: u64,
}

/// Makes one state after the other.
#[derive(Default)]
pub(super) struct Maker {
    version: u64,
    names: Arc<Piece>,
    routes: HashMap<RouteKey, Arc<Piece>>,
    cold_starts: HashMap<u64, Arc<Piece>>,
}

// === impl Maker ===

impl Maker {
    /// The state as it is now.
    pub(super) fn make(
        &mut self,
        about: About,
        gates: &[Arc<Gate>],
        cold_starts: &ColdStarts,
        samples: &Samples,
    ) -> Shown {
        self.version += 1;
        let version = self.version;
        let names: Vec<_> = gates.iter().map(|gate| gate.key()).collect();
        self.names = Piece::next(Some(&self.names), json(&names), version);

        let routes = gates.iter().map(|gate| {
            let piece = Piece::next(self.routes.get(gate.key()), json(&RouteStatus::of(gate)), version);
            (gate.key().clone(), piece)
        });
        let routes: Vec<_> = routes.collect();
        self.routes = routes.iter().cloned().collect();

        let recent = cold_starts.recent(None, COLD_STARTS).into_iter().map(|cold_start| {
            let piece = Piece::next(self.cold_starts.get(&cold_start.id), json(&cold_start), version);
            (cold_start.id, piece)
        });
        let recent: Vec<_> = recent.collect();
        self.cold_starts = recent.iter().cloned().collect();

        let held =
            gates.iter().map(|gate| (gate.key(), samples.last(gate.key()))).filter(|(_, held)| *held > 0);
        Shown {
            version,
            about: json(&about),
            names: self.names.clone(),
            routes,
            cold_starts: recent.into_iter().map(|(_, piece)| piece).collect(),
            held: json(&held.collect::<HashMap<_, _>>()),
        }
    }
}

// === impl Piece ===

impl Piece {
    /// The same piece if it is still so.
    fn next(before: Option<&Arc<Self>>, json: String, version: u64) -> Arc<Self> {
        match before {
            Some(before) if before.json == json => before.clone(),
            _ => Arc::new(Self { json, since: version }),
        }
    }
}

// === impl Shown ===

impl Shown {
    /// Rises with every state.
    pub(in crate::admin) const fn version(&self) -> u64 {
        self.version
    }

    /// Everything, as an event.
    pub(super) fn snapshot(&self, samples: &Samples) -> String {
        let history = self.routes.iter().map(|(name, _)| (name, samples.of(name).collect::<Vec<_>>()));
        self.event("snapshot", 0, &json(&history.collect::<HashMap<_, _>>()))
    }

    /// What has changed since that version, as an event.
    pub(super) fn update(&self, seen: u64) -> String {
        self.event("update", seen, &self.held)
    }

    fn event(&self, name: &str, seen: u64, held: &str) -> String {
        let is_new = |piece: &&Arc<Piece>| piece.since > seen;
        let list = |pieces: &mut dyn Iterator<Item = &Arc<Piece>>| {
            pieces.map(|piece| piece.json.as_str()).collect::<Vec<_>>().join(",")
        };
        let routes = list(&mut self.routes.iter().map(|(_, piece)| piece).filter(is_new));
        let cold_starts = list(&mut self.cold_starts.iter().filter(is_new));
        let about = &self.about;
        // No line breaks: they would be written as `\n` within JSON.
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

/// JSON of a type of ours, which has no keys but strings.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| unreachable!("our own types are JSON: {error}"))
}

fn as_map<S: serde::Serializer>(pairs: &[(&'static str, usize)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().copied())
}
