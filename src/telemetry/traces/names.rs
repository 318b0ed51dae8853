//! Names of spans, attributes and events. A test compares them to `docs/traces.md`.

/// Defines attributes and the list of all of them.
macro_rules! attributes {
    ($($(#[$doc:meta])* $name:ident = $key:literal;)*) => {
        $($(#[$doc])* pub const $name: &str = $key;)*

        /// All attributes.
        pub const ATTRIBUTES: &[&str] = &[$($key),*];
    };
}

attributes! {
    /// The method; `_OTHER` if it is not a known one.
    METHOD = "http.request.method";
    /// The method as received, if it is not a known one.
    METHOD_ORIGINAL = "http.request.method_original";
    /// Number of earlier attempts to dispatch the request.
    RESEND_COUNT = "http.request.resend_count";
    /// Path template of the API.
    ROUTE = "http.route";
    /// Status, if there was a response head.
    STATUS_CODE = "http.response.status_code";
    /// The path.
    URL_PATH = "url.path";
    /// `http` or `https`, as seen by the client.
    URL_SCHEME = "url.scheme";
    /// URL of an attempt, without the query.
    URL_FULL = "url.full";
    /// Requested host.
    SERVER_ADDRESS = "server.address";
    /// Requested port.
    SERVER_PORT = "server.port";
    /// Client address, as reported by proxies in front.
    CLIENT_ADDRESS = "client.address";
    /// Address of the connection's peer.
    PEER_ADDRESS = "network.peer.address";
    /// Port of the connection's peer.
    PEER_PORT = "network.peer.port";
    /// The version of HTTP.
    PROTOCOL_VERSION = "network.protocol.version";
    /// The client's software.
    USER_AGENT = "user_agent.original";
    /// Error class.
    ERROR_TYPE = "error.type";
    /// Operation of the model.
    OPERATION = "gen_ai.operation.name";
    /// Provider of the API.
    PROVIDER = "gen_ai.provider.name";
    /// Model name.
    MODEL = "gen_ai.request.model";
    /// True for a streamed response.
    STREAM = "gen_ai.request.stream";
    /// Time from the request to the first token, in seconds.
    FIRST_CHUNK = "gen_ai.response.time_to_first_chunk";
    /// Name of the route.
    ANTEROOM_ROUTE = "anteroom.route";
    /// Outcome, as in the metrics.
    OUTCOME = "anteroom.outcome";
    /// `x-request-id`.
    REQUEST_ID = "anteroom.request_id";
    /// True if a cold start held the request.
    COLD_START = "anteroom.cold_start";
    /// `id` of the cold start's record.
    COLD_START_ID = "anteroom.cold_start.id";
    /// Trace of the request that triggered the cold start.
    COLD_START_TRACE = "anteroom.cold_start.trace_id";
    /// Pod that became ready.
    POD = "anteroom.cold_start.pod";
    /// Time by which a phase may have ended earlier, in milliseconds.
    EARLY_MS = "anteroom.cold_start.early_ms";
}

/// Early 200 before the response.
pub const EARLY_200: &str = "anteroom.early_200";
/// Failed dispatch; the request is held again.
pub const HELD_AGAIN: &str = "anteroom.held_again";
/// Dispatch to the fallback after a failed wait.
pub const FELL_BACK: &str = "anteroom.fell_back";
/// First byte of the response.
pub const FIRST_BYTE: &str = "anteroom.first_byte";
/// First token of the response.
pub const FIRST_TOKEN: &str = "anteroom.first_token";

/// All events.
pub const EVENTS: &[&str] = &[EARLY_200, HELD_AGAIN, FELL_BACK, FIRST_BYTE, FIRST_TOKEN];

/// Span of a hold.
pub const HOLD: &str = "hold";

/// Prefix of the spans of phases (`cold_start.load`) and parts (`cold_start.load.weights`).
pub const PHASE: &str = "cold_start";

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;
    use crate::domain::{Part, Phase};

    /// Returns the names in the first column of the table below a heading.
    fn first_column(text: &str, heading: &str) -> BTreeSet<String> {
        let section = text.split(&format!("\n## {heading}\n")).nth(1).expect(heading);
        let section = section.split("\n## ").next().unwrap_or_default();
        let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
        let cells = rows.filter_map(|row| row.split(" | ").next());
        let names =
            cells.flat_map(|cell| cell.split("`, `").map(|name| name.trim_end_matches('`').to_owned()));
        names.collect()
    }

    #[test]
    fn document_lists_all_names() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/traces.md");
        let text = fs::read_to_string(path).unwrap();
        let known = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        assert_eq!(first_column(&text, "Attributes"), known(ATTRIBUTES));
        assert_eq!(first_column(&text, "Events"), known(EVENTS));
        for phase in Phase::ALL.into_iter().filter(|phase| *phase <= Phase::Dispatch) {
            assert!(text.contains(&format!("{PHASE}.{}", phase.name())), "{}", phase.name());
        }
        for part in Part::ALL {
            let name = format!("{PHASE}.{}.{}", part.phase().name(), part.name());
            assert!(text.contains(&name), "{name}");
        }
    }
}
