//! The names of spans, attributes and events. `docs/traces.md` has them all: a test compares.

/// An attribute, and which spans may have it.
macro_rules! attributes {
    ($($(#[$doc:meta])* $name:ident = $key:literal;)*) => {
        $($(#[$doc])* pub const $name: &str = $key;)*

        /// Every attribute.
        pub const ATTRIBUTES: &[&str] = &[$($key),*];
    };
}

attributes! {
    /// The method, or `_OTHER`.
    METHOD = "http.request.method";
    /// The method, where it is none that is known.
    METHOD_ORIGINAL = "http.request.method_original";
    /// How often a request had been sent before.
    RESEND_COUNT = "http.request.resend_count";
    /// The path as one of the API, without what it names.
    ROUTE = "http.route";
    /// The status, if a head went out or came.
    STATUS_CODE = "http.response.status_code";
    /// The path.
    URL_PATH = "url.path";
    /// `http` or `https`, as the client has it.
    URL_SCHEME = "url.scheme";
    /// Where an attempt goes to, without the query.
    URL_FULL = "url.full";
    /// The host that is asked.
    SERVER_ADDRESS = "server.address";
    /// Its port.
    SERVER_PORT = "server.port";
    /// Who asks, as far as proxies before us tell.
    CLIENT_ADDRESS = "client.address";
    /// Who connected.
    PEER_ADDRESS = "network.peer.address";
    /// From which port.
    PEER_PORT = "network.peer.port";
    /// The version of HTTP.
    PROTOCOL_VERSION = "network.protocol.version";
    /// The client's software.
    USER_AGENT = "user_agent.original";
    /// What went wrong, in one word.
    ERROR_TYPE = "error.type";
    /// What is asked of the model.
    OPERATION = "gen_ai.operation.name";
    /// Whose API it is.
    PROVIDER = "gen_ai.provider.name";
    /// Which model.
    MODEL = "gen_ai.request.model";
    /// Whether the answer is to be a stream.
    STREAM = "gen_ai.request.stream";
    /// From the request to the first token, in seconds.
    FIRST_CHUNK = "gen_ai.response.time_to_first_chunk";
    /// The route of the configuration.
    ANTEROOM_ROUTE = "anteroom.route";
    /// How the request ended, as in the metrics.
    OUTCOME = "anteroom.outcome";
    /// `x-request-id`.
    REQUEST_ID = "anteroom.request_id";
    /// Whether a cold start held it.
    COLD_START = "anteroom.cold_start";
    /// Which one: `id` of the record.
    COLD_START_ID = "anteroom.cold_start.id";
    /// The trace of the request that brought it about.
    COLD_START_TRACE = "anteroom.cold_start.trace_id";
    /// The pod that came up.
    POD = "anteroom.cold_start.pod";
    /// By how much a phase may truly have ended earlier, in milliseconds.
    EARLY_MS = "anteroom.cold_start.early_ms";
}

/// A 200 went out before the answer was there.
pub const EARLY_200: &str = "anteroom.early_200";
/// A dispatch failed, and the request is held again.
pub const HELD_AGAIN: &str = "anteroom.held_again";
/// What waited in vain goes to the fallback.
pub const FELL_BACK: &str = "anteroom.fell_back";
/// The answer began.
pub const FIRST_BYTE: &str = "anteroom.first_byte";
/// Its first token came.
pub const FIRST_TOKEN: &str = "anteroom.first_token";

/// Every event.
pub const EVENTS: &[&str] = &[EARLY_200, HELD_AGAIN, FELL_BACK, FIRST_BYTE, FIRST_TOKEN];

/// A request is held.
pub const HOLD: &str = "hold";

/// How the names of the phases begin, and with a second dot those of their parts.
pub const PHASE: &str = "cold_start";

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;
    use crate::domain::{Part, Phase};

    /// What stands first in the rows of the table below a heading, in code quotes.
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
    fn the_document_has_all_of_them_and_no_more() {
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
