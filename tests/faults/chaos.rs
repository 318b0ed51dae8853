//! Random faults, all at once. A failure reports the seed; `ANTEROOM_CHAOS_SEED` repeats it and `ANTEROOM_CHAOS_STEPS`
//! sets the number of steps. The seed determines the steps, but their timing depends on the machine.

use std::{collections::BTreeMap, env, net::SocketAddr, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::sleep,
};

use crate::{
    law,
    served::{ANTEROOM, ProxyProcess},
    sim::{SimAddress, SimProcess},
    support::{
        soon, until,
        upstream::reset,
        wire::{CHAT, post},
    },
};

const STEPS: u64 = 120;

/// Behaviour of a client after it has sent its request.
#[derive(Clone, Copy, Debug)]
enum ClientBehaviour {
    Reads,
    HangsUp(Duration),
    Resets(Duration),
    HalfCloses(Duration),
    /// Reads on only when everything is over.
    StopsReading,
    StopsSending,
}

struct ChaosTest {
    rng: fastrand::Rng,
    place: SimAddress,
    sim: Option<SimProcess>,
    proxy: ProxyProcess,
    clients: Vec<JoinHandle<Option<u16>>>,
}

fn config(url: &str, max: u32) -> String {
    let command = serde_json::json!([
        ANTEROOM,
        "sim",
        "--port",
        "{port}",
        "--load-time=100ms",
        "--inter-token-time=5ms",
        "--reset-before-head=0.1",
        "--reset-mid-stream=0.1",
        "--error-rate=0.1",
    ]);
    let process = format!("process: {{ command: {command}, idleTimeout: 300ms, stopTimeout: 500ms }}");
    let policies = format!(
        "hold: {{ timeout: 3s, maxRequests: 20 }}, keepalive: {{ after: 200ms, interval: 100ms }}, scaling: {{ linger: 0s }}, \
         concurrency: {{ max: {max}, rampStart: 1 }}, readiness: {{ interval: 20ms, timeout: 200ms, activationTimeout: 2s }}, \
         upstream: {{ connectTimeout: 500ms, responseTimeout: 1s, idleTimeout: 1s }}"
    );
    format!(
        "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nallowedHosts: [\"*\"]\nworkers: 2\n\
         limits: {{ maxBodyBytes: 32KiB, maxBufferedBytes: 128KiB, maxConnections: 60, headerTimeout: 1s, \
         bodyTimeout: 500ms, stallTimeout: 500ms }}\n\
         routes:\n  - {{ name: tiny, match: {{ models: [tiny] }}, target: {{ url: \"{url}\" }}, {policies} }}\n  \
         - {{ name: own, match: {{ models: [own] }}, target: {{ {process} }}, {policies} }}\n"
    )
}

/// Sends the request as this kind of client, and returns the status if the client waited for one.
async fn client(address: SocketAddr, request: String, how: ClientBehaviour) -> Option<u16> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let sent = if matches!(how, ClientBehaviour::StopsSending) { request.len() - 5 } else { request.len() };
    stream.write_all(&request.as_bytes()[..sent]).await.ok()?;
    match how {
        ClientBehaviour::HangsUp(after) => sleep(after).await,
        ClientBehaviour::Resets(after) => {
            sleep(after).await;
            reset(stream);
        }
        ClientBehaviour::HalfCloses(after) => {
            sleep(after).await;
            let _ = stream.shutdown().await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
        ClientBehaviour::StopsReading => {
            let mut first = [0; 1];
            let _ = stream.read(&mut first).await;
            sleep(Duration::from_secs(2)).await;
        }
        ClientBehaviour::Reads | ClientBehaviour::StopsSending => {
            let mut heard = Vec::new();
            let _ = stream.read_to_end(&mut heard).await;
            let heard = String::from_utf8_lossy(&heard);
            return heard.split(' ').nth(1).and_then(|status| status.parse().ok());
        }
    }
    None
}

// === impl ChaosTest ===

impl ChaosTest {
    fn below(&mut self, number: u64) -> u64 {
        self.rng.u64(..number)
    }

    fn milliseconds(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(most))
    }

    fn step(&mut self) {
        match self.below(20) {
            0..13 => self.ask(),
            13 => drop(self.sim.take()),
            14 => {
                let (how_often, seed) = (self.rng.f64() / 3.0, self.below(1000));
                let rate = |fault: &str| format!("--{fault}={how_often}");
                let flags = [
                    rate("reset-before-head"),
                    rate("reset-mid-stream"),
                    rate("error-rate"),
                    format!("--seed={seed}"),
                    format!("--closed-time={seed}ms"),
                    "--inter-token-time=5ms".into(),
                ];
                // Kill the old process first: both use the same port.
                self.sim = None;
                self.sim = Some(self.place.start(&flags.each_ref().map(String::as_str)));
            }
            15 => {
                if let Some(sim) = &self.sim {
                    sim.signal(if self.rng.bool() { Signal::STOP } else { Signal::CONT });
                }
            }
            16 => self.kill_or_stop_server(),
            17 => {
                let max = self.below(6) as u32 + 1;
                self.proxy.write(&config(&self.place.url(), max));
            }
            18 => self.proxy.write("routes: ["),
            _ => self.proxy.signal(Signal::HUP),
        }
    }

    fn ask(&mut self) {
        let model = self.rng.choice(["tiny", "own"]).unwrap();
        let (stream, tokens) = (self.rng.bool(), self.below(40) + 1);
        // Some bodies are too large alone, others only together.
        let text = "x".repeat(self.below(34 << 10) as usize * usize::from(self.below(4) == 0));
        let body = format!(
            r#"{{"model":"{model}","stream":{stream},"max_tokens":{tokens},"messages":[{{"role":"user","content":"{text}"}}]}}"#
        );
        let request = post(CHAT, &body).replacen("\r\n", "\r\nConnection: close\r\n", 1);
        let after = self.milliseconds(600);
        let how = match self.below(12) {
            0 => ClientBehaviour::HangsUp(after),
            1 => ClientBehaviour::Resets(after),
            2 => ClientBehaviour::HalfCloses(after),
            3 => ClientBehaviour::StopsReading,
            4 => ClientBehaviour::StopsSending,
            _ => ClientBehaviour::Reads,
        };
        self.clients.push(tokio::spawn(client(self.proxy.address, request, how)));
    }

    /// Kills or stops a model server managed by the proxy.
    fn kill_or_stop_server(&mut self) {
        let servers: Vec<Pid> = self.proxy.model_servers();
        if let Some(&server) = self.rng.choice(&servers) {
            let signal = if self.below(3) == 0 { Signal::STOP } else { Signal::KILL };
            // The process may have exited already.
            let _ = kill_process(server, signal);
        }
    }
}

/// Clients read, hang up, reset, half-close or stall. One server is killed, replaced, stopped, slow and faulty; a model
/// server managed by the proxy is killed and stopped; good and bad configurations are loaded. Invariants: every waiting
/// client gets a response or sees its connection close; each admitted request has exactly one outcome, never
/// `internal`; at the end nothing is held, no bytes, descriptors, threads or processes are left, and the next request
/// is served.
#[tokio::test]
async fn random_faults_preserve_the_accounting() {
    let number = |name: &str| env::var(name).ok().map(|text| text.parse().unwrap());
    let seed = number("ANTEROOM_CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..));
    let steps = number("ANTEROOM_CHAOS_STEPS").unwrap_or(STEPS);
    eprintln!("ANTEROOM_CHAOS_SEED={seed}");
    let place = SimAddress::reserve();
    let proxy = ProxyProcess::start(&config(&place.url(), 4)).await;
    let sim = Some(place.up(&[]).await);
    let mut chaos = ChaosTest { rng: fastrand::Rng::with_seed(seed), place, sim, proxy, clients: Vec::new() };
    chaos.serves("tiny").await;
    chaos.serves("own").await;
    chaos.await_own_server_stopped().await;
    let before = chaos.proxy.resources();
    for _ in 0..steps {
        chaos.step();
        let pause = chaos.milliseconds(30);
        sleep(pause).await;
    }

    chaos.sim = None;
    chaos.sim = Some(chaos.place.start(&[]));
    chaos.proxy.write(&config(&chaos.place.url(), 4));
    let mut heard = BTreeMap::<_, u64>::new();
    for client in chaos.clients.drain(..) {
        *heard.entry(soon("a client to end", client).await.unwrap()).or_default() += 1;
    }
    let known = [200, 408, 413, 429, 500, 502, 503, 504];
    assert!(heard.keys().flatten().all(|status| known.contains(status)), "{heard:?}");
    let counts = law::holds(chaos.proxy.admin).await;
    eprintln!("{heard:?}, {counts:?}");
    assert_eq!(counts.ended("internal"), 0, "{counts:?}");
    chaos.serves("tiny").await;
    chaos.serves("own").await;
    chaos.await_own_server_stopped().await;
    chaos.proxy.await_released_resources(before).await;
    chaos.proxy.stop().await;
}

impl ChaosTest {
    /// Retries until a request is served: the first ones may still meet leftovers of the chaos, or injected faults of
    /// the server.
    async fn serves(&self, model: &str) {
        let body = format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"x"}}]}}"#);
        let request = post(CHAT, &body).replacen("\r\n", "\r\nConnection: close\r\n", 1);
        let asked = async || client(self.proxy.address, request.clone(), ClientBehaviour::Reads).await;
        until(model, async || soon("an answer", asked()).await == Some(200)).await;
    }

    async fn await_own_server_stopped(&self) {
        until("its own server to be stopped", async || {
            let routes = self.proxy.admin("/api/v1/routes").await;
            let own =
                routes["routes"].as_array().unwrap().iter().find(|route| route["name"] == "own").cloned();
            own.unwrap()["state"] == "idle"
        })
        .await;
    }
}
