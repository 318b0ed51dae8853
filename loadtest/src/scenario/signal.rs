//! The signal scenario: time from a request for a route at zero until KEDA is notified.
//!
//! Targets refuse connections, so every request is an activation. Requests are measured one at a time: from just
//! before the write until the frame with `true` arrives on the stream of that route.

use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::runtime;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::admin;
use crate::clock::Instant;
use crate::error::LoadtestError;
use crate::findings::{Criterion, Findings, Table, disturbed, thousands};
use crate::keda::{DemandMessage, ScalerConnection};
use crate::procfs::Meter;
use crate::setup::Setup;

/// Routes, connections, and samples in a quick and in a full run. A single route is at zero again after about 25 ms.
const SIGNAL_SETTINGS: [(usize, usize, usize, usize); 3] =
    [(1, 1, 200, 1000), (1000, 1, 1000, 4000), (1000, 100, 1000, 4000)];
const MAX_PUSH_P99_MS: f64 = 1.0;
/// Time a push may take before the run is abandoned.
const PUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a new connection to be accepted, excluded from the measurement.
const ACCEPT_WAIT: Duration = Duration::from_millis(1);

/// Results for one setting.
#[derive(Debug, Serialize)]
struct SignalResult {
    routes: usize,
    connections: usize,
    samples: u64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    max_us: f64,
    /// CPU time of Anteroom per sample, including the activation and its end.
    cpu_us: f64,
    /// Cores used by other processes, on our two cores.
    others: f64,
}

/// The streams and the last state of each.
struct DemandStreams {
    news: mpsc::UnboundedReceiver<Result<DemandMessage, String>>,
    active: Vec<bool>,
}

pub(crate) fn run(setup: &Setup) -> Result<Findings, LoadtestError> {
    let mut lines = Vec::new();
    for (routes, connections, quick, full) in SIGNAL_SETTINGS {
        eprintln!("signal: {routes} routes, streams on {connections} connections");
        lines.push(measure(setup, routes, connections, if setup.quick { quick } else { full })?);
    }
    Ok(findings(&lines))
}

fn measure(
    setup: &Setup,
    routes: usize,
    connections: usize,
    samples: usize,
) -> Result<SignalResult, LoadtestError> {
    let [scaler, nobody] = free_ports().map_err(|error| LoadtestError::io("find a free port", error))?;
    let mut running =
        setup.anteroom()?.start_with(&configuration(routes, scaler.port()), nobody, setup.cores)?;
    admin::await_ready(&mut running, setup)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| LoadtestError::io("make a runtime", error))?;
    let meter = Meter { cores: setup.cores, contender: running.process.as_ref().map(|process| process.id()) };
    let measured = runtime.block_on(async {
        // Like the rig, keep this core from sleeping, so that its wake-up latency is not measured.
        let busy = tokio::spawn(async {
            loop {
                tokio::task::yield_now().await;
            }
        });
        let mut listening = listen(scaler, routes, connections).await?;
        let failed = |error: io::Error| LoadtestError::io("read the times of processes", error);
        let (begin, before) = (Instant::now(), meter.read().map_err(failed)?);
        let mut latency = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3).expect("valid bounds");
        for sample in 0..samples {
            setup.check_stop()?;
            let took = listening.sample(running.address, sample % routes).await?;
            latency.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
        let spent = before.until(&meter.read().map_err(failed)?);
        busy.abort();
        let us = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
        Ok(SignalResult {
            routes,
            connections,
            samples: latency.len(),
            p50_us: us(0.5),
            p90_us: us(0.9),
            p99_us: us(0.99),
            max_us: latency.max() as f64 / 1e3,
            cpu_us: spent.contender.as_secs_f64() * 1e6 / samples as f64,
            others: spent.others.as_secs_f64() / begin.elapsed().as_secs_f64(),
        })
    });
    measured.map_err(|error| running.explain("anteroom", error))
}

/// Returns an address without a listener, and one for the scaler.
fn free_ports() -> io::Result<[SocketAddr; 2]> {
    let [one, other] =
        [TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?, TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?];
    Ok([one.local_addr()?, other.local_addr()?])
}

/// Configures activations to fail, and demand to end, about 20 ms after a request, so that a route is soon at zero
/// again.
fn configuration(routes: usize, scaler: u16) -> String {
    let mut text = format!(
        "listen: 127.0.0.1:{{listen}}\nadmin: 127.0.0.1:{{admin}}\nscaler: 127.0.0.1:{scaler}\nworkers: 1\nroutes:\n"
    );
    for route in 0..routes {
        let _ = write!(
            text,
            "  - name: r{route}\n    match: {{ models: [m{route}] }}\n    target: {{ url: http://127.0.0.1:{{backend}} }}\n    \
             readiness: {{ activationTimeout: 20ms, interval: 5ms }}\n    scaling: {{ linger: 1ms }}\n"
        );
    }
    text
}

fn request(route: usize) -> String {
    let body = format!(r#"{{"model":"m{route}","messages":[{{"role":"user","content":"Hello"}}]}}"#);
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Opens a stream per route and waits for the first message on each.
async fn listen(
    scaler: SocketAddr,
    routes: usize,
    connections: usize,
) -> Result<DemandStreams, LoadtestError> {
    let failed = |error| LoadtestError::io("open a stream to the scaler", error);
    let (sender, news) = mpsc::unbounded_channel();
    let mut all = Vec::new();
    for _ in 0..connections {
        all.push(ScalerConnection::open(scaler).await.map_err(failed)?);
    }
    for route in 0..routes {
        let connection = &all[route % connections];
        connection.follow(&format!("r{route}"), route, sender.clone()).await.map_err(failed)?;
    }
    let mut listening = DemandStreams { news, active: vec![true; routes] };
    while listening.active.contains(&true) {
        listening.next().await?;
    }
    Ok(listening)
}

// === impl DemandStreams ===

impl DemandStreams {
    async fn next(&mut self) -> Result<DemandMessage, LoadtestError> {
        let said = match timeout(PUSH_TIMEOUT, self.news.recv()).await {
            Ok(Some(Ok(said))) => said,
            Ok(Some(Err(why))) => return Err(LoadtestError::unsound("signal", why)),
            Ok(None) => return Err(LoadtestError::unsound("signal", "all streams have ended")),
            Err(_) => {
                let why = format!("no message on any stream within {} s", PUSH_TIMEOUT.as_secs());
                return Err(LoadtestError::unsound("signal", why));
            }
        };
        self.active[said.stream] = said.active;
        Ok(said)
    }

    /// Waits until the route is at zero, sends a request to it, and measures the time to the push. Then disconnects.
    async fn sample(&mut self, proxy: SocketAddr, route: usize) -> Result<Duration, LoadtestError> {
        while self.active[route] {
            self.next().await?;
        }
        let failed = |error| LoadtestError::io("send a request", error);
        let mut client = TcpStream::connect(proxy).await.map_err(failed)?;
        client.set_nodelay(true).map_err(failed)?;
        sleep(ACCEPT_WAIT).await;
        let request = request(route);
        let begin = Instant::now();
        client.write_all(request.as_bytes()).await.map_err(failed)?;
        loop {
            let said = self.next().await?;
            if said.stream == route && said.active {
                return Ok(said.at - begin);
            }
        }
    }
}

fn findings(lines: &[SignalResult]) -> Findings {
    let who = |line: &SignalResult| {
        let (routes, connections) = (thousands(line.routes as f64), line.connections);
        let s = |count| if count == 1 { "" } else { "s" };
        format!(
            "{routes} route{} and stream{}, {connections} connection{}",
            s(line.routes),
            s(line.routes),
            s(connections)
        )
    };
    let header = ["setting", "samples", "p50 µs", "p90 µs", "p99 µs", "max µs", "CPU µs"];
    let row = |line: &SignalResult| {
        let us = |value: f64| format!("{value:.0}");
        let figures = [line.p50_us, line.p90_us, line.p99_us, line.max_us, line.cpu_us].map(us);
        [who(line), thousands(line.samples as f64)].into_iter().chain(figures).collect()
    };
    let noise = |line: &SignalResult| Some(format!("{}: {}", who(line), disturbed(line.others)?));
    Findings {
        scenario: "signal",
        how: "one request at a time, each to a route at zero".into(),
        tables: vec![Table {
            title: String::new(),
            header: header.map(str::to_owned).into(),
            rows: lines.iter().map(row).collect(),
            legend: Some(
                "from before the request is written until the push has arrived; CPU: of anteroom for one activation",
            ),
        }],
        results: serde_json::to_value(lines).unwrap_or_default(),
        aims: lines
            .iter()
            .map(|line| {
                let what = "ms from the request to the push at the 99th percentile, at most";
                Criterion::at_most(
                    format!("anteroom, {}", who(line)),
                    what,
                    MAX_PUSH_P99_MS,
                    line.p99_us / 1e3,
                )
            })
            .collect(),
        notes: lines.iter().filter_map(noise).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contender_configuration_has_only_known_blanks() {
        let text = configuration(3, 7000);
        assert_eq!(text.matches("- name: r").count(), 3);
        let known = ["{listen}", "{admin}", "{backend}"];
        let filled = known.iter().fold(text, |text, blank| text.replace(blank, "1"));
        assert!(!filled.contains("{l") && !filled.contains("{a") && !filled.contains("{b"), "{filled}");
    }

    #[test]
    fn push_p99_above_limit_misses() {
        let line = |p99_us, others| SignalResult {
            routes: 1000,
            connections: 1,
            samples: 1000,
            p50_us: 100.0,
            p90_us: 200.0,
            p99_us,
            max_us: 5000.0,
            cpu_us: 300.0,
            others,
        };
        let found = findings(&[line(999.0, 0.0), line(1001.0, 0.2)]);
        assert_eq!(found.aims.iter().map(|aim| aim.met).collect::<Vec<_>>(), [true, false]);
        assert_eq!(found.notes.len(), 1, "{:?}", found.notes);
        assert!(
            found.aims[0].who.contains("1,000 routes and streams, 1 connection"),
            "{}",
            found.aims[0].who
        );
    }

    /// The scaler is a stand-in that sends `false` at once, and `true` as soon as a request arrives.
    #[tokio::test]
    async fn sample_waits_for_its_own_route() {
        let scaler = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (scaler_address, proxy_address) = (scaler.local_addr().unwrap(), proxy.local_addr().unwrap());
        let serving = tokio::spawn(async move {
            let mut connection = h2::server::handshake(scaler.accept().await.unwrap().0).await.unwrap();
            let mut streams = Vec::new();
            for _ in 0..2 {
                let (_, mut respond) = connection.accept().await.unwrap().unwrap();
                let mut stream = respond.send_response(http::Response::new(()), false).unwrap();
                stream.send_data(bytes::Bytes::from_static(&[0; 5]), false).unwrap();
                streams.push(stream);
            }
            let requests = async {
                let _client = proxy.accept().await.unwrap();
                for stream in &mut streams {
                    let word = bytes::Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]);
                    stream.send_data(word, false).unwrap();
                }
                std::future::pending::<()>().await
            };
            tokio::join!(requests, async { while connection.accept().await.is_some() {} });
        });
        let mut listening = listen(scaler_address, 2, 1).await.unwrap();
        assert_eq!(listening.active, [false, false]);
        listening.sample(proxy_address, 1).await.unwrap();
        assert!(listening.active[1]);
        serving.abort();
    }
}
