//! Metrics and labels that `/metrics` exports: scraped from a running proxy after cold starts, and, for metrics that
//! exist only in a cluster, rendered by the same registry from a stub view.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    sync::{Arc, LazyLock},
};

use anteroom::{
    admin::{Admin, ClusterCounts, ColdStartMetrics, View},
    admission::Gate,
    coldstart::ColdStarts,
    domain::Policy,
    error::ProxyError,
    history::RequestHistory,
    telemetry::{RouteCounters, StaticKind},
};
use http::{HeaderMap, HeaderValue};
use serde_json::Value;

/// Label names of each metric, keyed by the name of its samples.
pub type Exported = BTreeMap<String, BTreeSet<String>>;

/// Child process, killed on drop even if the test panics.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the samples of both sources.
pub fn exported() -> &'static Exported {
    static EXPORTED: LazyLock<Exported> = LazyLock::new(|| {
        let mut exported = read(&of_a_run());
        for (name, labels) in read(&of_a_cluster()) {
            exported.entry(name).or_default().extend(labels);
        }
        exported
    });
    &EXPORTED
}

/// Returns the names of the metric families; a histogram counts as one name, not three.
pub fn metrics() -> BTreeSet<String> {
    let types = [of_a_run(), of_a_cluster()].concat();
    types
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .map(String::from)
        .collect()
}

/// Scrapes a proxy after a failed start, a successful one and a request for an unknown model.
fn of_a_run() -> String {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("anteroom.yaml");
        let program = env!("CARGO_BIN_EXE_anteroom");
        let text = format!(
            "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nscaler: 127.0.0.1:0\nlog: json\nworkers: 1\n\
             peers: {{ listen: 127.0.0.1:0, service: \"127.0.0.1:1\" }}\n\
             routes:\n\
             - {{ name: a, match: {{ models: [a] }}, target: {{ process: {{ command: [\"false\", \"{{port}}\"] }} }} }}\n\
             - name: b\n  match: {{ models: [b] }}\n  target:\n    process:\n      command: [{program}, sim, --port, \"{{port}}\"]\n"
        );
        std::fs::write(&file, text).unwrap();
        let child =
            Command::new(program).args(["serve", "--config"]).arg(&file).stderr(Stdio::piped()).spawn();
        let mut running = KillOnDrop(child.unwrap());
        let mut lines = BufReader::new(running.0.stderr.take().unwrap()).lines().map(Result::unwrap);
        let (address, admin) = lines
            .find_map(|line| {
                let line = serde_json::from_str::<Value>(&line).ok()?;
                Some((line["address"].as_str()?.to_owned(), line["admin"].as_str()?.to_owned()))
            })
            .expect("it says where it listens");
        // Drain the rest of the log: a full pipe would block the proxy.
        let reader = std::thread::spawn(move || lines.for_each(drop));
        for (model, expected) in [("a", "cold_start_failed"), ("b", "[DONE]"), ("c", "model_not_found")] {
            let body = format!("{{\"model\":\"{model}\",\"stream\":true,\"max_tokens\":2,\"prompt\":\"x\"}}");
            let answer = ask(
                &address,
                &format!(
                    "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                ),
            );
            assert!(answer.contains(expected), "{model}: {answer}");
        }
        // The record ends with the first token, which the client may have read before the record is written.
        let text = loop {
            let text = scrape(&admin);
            if text.contains("outcome=\"completed\",kind=") {
                break text;
            }
            std::thread::yield_now();
        };
        drop(running);
        reader.join().unwrap();
        text
    });
    TEXT.clone()
}

/// View of a proxy in a cluster whose route has served a placeholder and used its fallback.
struct FakeClusterView {
    gate: Arc<Gate>,
    unrouted: RouteCounters,
    history: Arc<RequestHistory>,
}

impl View for FakeClusterView {
    fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 8080))
    }

    fn example(&self) -> Option<String> {
        None
    }

    fn check_page(&self, _: &str, _: &HeaderMap, _: bool) -> Result<(), ProxyError> {
        Ok(())
    }

    fn listed_origin(&self, _: &HeaderMap) -> Option<HeaderValue> {
        None
    }

    fn gates(&self) -> Vec<Arc<Gate>> {
        vec![self.gate.clone()]
    }

    fn unrouted(&self) -> &RouteCounters {
        &self.unrouted
    }

    fn history(&self) -> &RequestHistory {
        &self.history
    }

    fn memory(&self) -> Vec<(&'static str, usize)> {
        vec![("body", 0), ("unfinished_body", 0), ("head", 0), ("request", 0), ("answer", 0), ("relay", 0)]
    }

    fn awaits_routes(&self) -> bool {
        false
    }

    fn has_scaler(&self) -> bool {
        false
    }

    fn peers(&self) -> Vec<(&'static str, usize)> {
        Vec::new()
    }

    fn spans(&self) -> Option<[(&'static str, u64); 3]> {
        Some([("exported", 1), ("dropped", 0), ("failed", 0)])
    }

    fn cluster(&self) -> Option<ClusterCounts> {
        Some(ClusterCounts {
            routes: vec![("ModelRoute", "Accepted", 1)],
            status_writes: vec![("written", 1)],
            watches: (1, 0, 0),
        })
    }
}

fn of_a_cluster() -> String {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        listener.set_nonblocking(true).unwrap();
        let asking = std::thread::spawn(move || scrape(&address));
        runtime.block_on(async {
            let store = ColdStarts::new(|_| {});
            let gate = Gate::new("llm/chat".into(), Policy::default(), store.clone());
            gate.counters().record_static_answer(StaticKind::Placeholder);
            gate.counters().fall_back();
            let view = Arc::new(FakeClusterView {
                gate,
                unrouted: RouteCounters::default(),
                history: RequestHistory::new(0),
            });
            let metrics = ColdStartMetrics::default();
            let admin = Admin::new(view, store, &metrics, Arc::default(), Default::default());
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let serving = tokio::spawn(admin.serve(listener));
            let text = tokio::task::spawn_blocking(|| asking.join().unwrap()).await.unwrap();
            serving.abort();
            text
        })
    });
    TEXT.clone()
}

fn scrape(address: &str) -> String {
    ask(address, "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
}

fn ask(address: &str, request: &str) -> String {
    let mut connection = TcpStream::connect(address).unwrap();
    connection.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    answer
}

/// Returns each sample name with its labels; for a metric without samples, its names with no labels.
fn read(text: &str) -> Exported {
    let mut exported = Exported::new();
    for line in text.lines() {
        if let Some(described) = line.strip_prefix("# TYPE ") {
            let (name, kind) = described.split_once(' ').unwrap();
            let endings: &[&str] = match kind {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_count", "_sum"],
                _ => &[""],
            };
            for ending in endings {
                exported.entry(format!("{name}{ending}")).or_default();
            }
            continue;
        }
        let Some(end) = line.find(['{', ' ']) else { continue };
        let Some(labels) = exported.get_mut(&line[..end]) else { continue };
        let mut rest = line[end..].strip_prefix('{').unwrap_or("}");
        // `name="value"` pairs up to the brace; values may contain escaped quotes.
        while let Some((name, after)) = rest.trim_start_matches(',').split_once("=\"") {
            if name.contains('}') {
                break;
            }
            labels.insert(name.into());
            let mut escaped = false;
            let close = after.find(|character| {
                let closes = character == '"' && !escaped;
                escaped = character == '\\' && !escaped;
                closes
            });
            rest = &after[close.unwrap() + 1..];
        }
    }
    exported
}

#[test]
fn samples_are_read_with_their_labels() {
    let text = "HTTP/1.1 200 OK\r\n\r\n# HELP a_seconds x.\n# TYPE a_seconds histogram\n\
                a_seconds_bucket{route=\"x\\\"}=\\\\\",le=\"1.0\"} 1 # {trace_id=\"7\"} 0.5\na_seconds_count{route=\"x\"} 1\n\
                # TYPE b counter\n# TYPE c gauge\nc 1\n";
    let labels = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let expected = [
        ("a_seconds_bucket", labels(&["le", "route"])),
        ("a_seconds_count", labels(&["route"])),
        ("a_seconds_sum", labels(&[])),
        ("b_total", labels(&[])),
        ("c", labels(&[])),
    ];
    assert_eq!(read(text), expected.map(|(name, labels)| (name.to_owned(), labels)).into());
}
