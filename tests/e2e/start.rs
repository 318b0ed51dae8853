//! The start, and the binary observed from outside: ports, signals, the configuration file.

use std::{fs, net::SocketAddr, process::Stdio};

use anteroom::{app::BoundProxy, scaler};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStderr, Command},
};

use crate::support::{
    TestUpstream, Wire,
    proxy::{options, parse},
    route, routes, soon, until,
    upstream::{LAST, STREAM, chunk},
    wire::{CHAT, chat, get, post, streaming},
};

const UNREACHABLE_ROUTE_CONFIG: &str = "routes: [{ name: a, target: { url: http://127.0.0.1:9 } }]";

/// `anteroom serve` as a process, with its log.
struct LoggedProcess {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
    address: SocketAddr,
    folder: tempfile::TempDir,
}

// === impl LoggedProcess ===

impl LoggedProcess {
    async fn start(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let command = command(&folder, &[]);
        Self::spawn(folder, config, command).await
    }

    async fn spawn(folder: tempfile::TempDir, config: &str, mut command: Command) -> Self {
        fs::write(folder.path().join("anteroom.yaml"), config).unwrap();
        let mut child = command.spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut served = Self { child, log, address: SocketAddr::from(([0; 4], 0)), folder };
        let listening = served.logged("listening").await;
        served.address = listening["address"].as_str().unwrap().parse().unwrap();
        served
    }

    /// Waits for a log line with this message.
    async fn logged(&mut self, message: &str) -> Value {
        loop {
            let line = soon(message, self.log.next_line()).await.unwrap().expect("a line before the end");
            let line: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("JSON: {line}"));
            if line["message"].as_str().is_some_and(|said| said.contains(message)) {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().unwrap().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    fn write(&self, config: &str) {
        let path = self.folder.path().join("anteroom.yaml");
        // Atomically, as editors and kubelets do.
        fs::write(path.with_extension("new"), config).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    }

    async fn ask(&self, request: impl AsRef<[u8]>) -> crate::support::wire::WireResponse {
        Wire::connect(self.address).await.ask(request).await
    }
}

fn command(folder: &tempfile::TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anteroom"));
    command
        .args(["serve", "--log-format", "json", "-c"])
        .arg(folder.path().join("anteroom.yaml"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

#[tokio::test]
async fn port_in_use_fails_start_without_residue() {
    let (taken, free) =
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let (taken_at, free_at) = (taken.local_addr().unwrap(), free.local_addr().unwrap());
    drop(free);
    // With several workers the sockets share their address, which must not hide a conflict with another program.
    for workers in [1, 2] {
        for (listen, admin, key) in [(taken_at, free_at, "listen"), (free_at, taken_at, "admin")] {
            let yaml =
                format!("listen: {listen}\nadmin: {admin}\nworkers: {workers}\n{UNREACHABLE_ROUTE_CONFIG}\n");
            let Err(error) = BoundProxy::new(parse(&yaml), options()).await else { panic!("{key} is taken") };
            let text = error.to_string();
            assert!(text.contains(key) && text.contains(&taken_at.to_string()), "{text}");
            assert!(text.contains("another program has it"), "{text}");
            assert!(TcpStream::connect(free_at).await.is_err(), "the other port is not kept");
        }
    }
}

#[tokio::test]
async fn second_proxy_cannot_share_the_port() {
    let yaml = format!("listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nworkers: 2\n{UNREACHABLE_ROUTE_CONFIG}\n");
    let first = BoundProxy::new(parse(&yaml), scaler::Options::default()).await.unwrap();
    let yaml = yaml.replacen("127.0.0.1:0", &first.address.to_string(), 1);
    assert!(BoundProxy::new(parse(&yaml), scaler::Options::default()).await.is_err());
    let yaml = yaml
        .replace(&first.address.to_string(), "127.0.0.1:0")
        .replace("admin: 127.0.0.1:0", &format!("admin: {}", first.admin_address));
    assert!(BoundProxy::new(parse(&yaml), scaler::Options::default()).await.is_err());
}

#[tokio::test]
async fn invalid_config_fails_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    fs::write(
        folder.path().join("anteroom.yaml"),
        format!("admin: 127.0.0.1:0\n{UNREACHABLE_ROUTE_CONFIG}\n"),
    )
    .unwrap();
    let output = soon("the end", command(&folder, &["--listen", &address]).output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("error: cannot listen on {address} (`listen`)")), "{text}");
}

#[tokio::test]
async fn sigterm_finishes_requests_and_exits_0() {
    let mut upstream = TestUpstream::warm().await;
    let config =
        format!("drainDelay: 100ms\ndrainTimeout: 10m\n{}", routes(&[route("tiny", &upstream.url(), "")]));
    let mut served = LoggedProcess::start(&config).await;
    let mut client = Wire::connect(served.address).await;
    client.send(chat("one")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    client.send(streaming("two")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(STREAM).await;
    client.head().await.unwrap();
    served.signal(Signal::TERM);
    served.logged("draining").await;
    until("nothing to be accepted", async || TcpStream::connect(served.address).await.is_err()).await;
    call.finish(chunk("the rest") + LAST).await;
    assert_eq!(client.rest().await.as_deref(), Some("the rest"));

    let last = served.logged("stopped").await;
    assert_eq!(
        (last["admitted"].as_u64(), last["held"].as_u64(), last["in_flight"].as_u64()),
        (Some(2), Some(0), Some(0))
    );
    let outcomes = last["outcomes"].as_str().unwrap();
    let sum: u64 =
        outcomes.split(' ').map(|one| one.split_once('=').unwrap().1.parse::<u64>().unwrap()).sum();
    assert!(sum == 2 && outcomes.contains("completed=2"), "{outcomes}");
    assert_eq!(
        soon("the end of the log", served.log.next_line()).await.unwrap(),
        None,
        "and it is the last line"
    );
    assert_eq!(soon("the exit", served.child.wait()).await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn ctrl_c_skips_delay_and_second_one_ends_at_once() {
    let mut upstream = TestUpstream::warm().await;
    let config =
        format!("drainDelay: 10m\ndrainTimeout: 10m\n{}", routes(&[route("tiny", &upstream.url(), "")]));
    let mut served = LoggedProcess::start(&config).await;
    let mut client = Wire::connect(served.address).await;
    client.send(streaming("endless")).await;
    let call = upstream.call().await;
    served.signal(Signal::INT);
    until("nothing to be accepted", async || TcpStream::connect(served.address).await.is_err()).await;
    served.signal(Signal::INT);
    client.end().await;
    call.gone().await;
    let last = served.logged("stopped").await;
    assert!(last["outcomes"].as_str().unwrap().contains("draining=1"), "{last}");
    assert_eq!(soon("the exit", served.child.wait()).await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn valid_change_is_loaded_invalid_one_ignored() {
    let mut upstream = TestUpstream::cold().await;
    let good = routes(&[route("tiny", &upstream.url(), "")]);
    let mut served = LoggedProcess::start(&good).await;
    let mut held = Wire::connect(served.address).await;
    held.send(chat("held")).await;
    upstream.probed().await;
    for bad in ["routes: [", "rooutes: []\n", "listen: nowhere\n", &good.replace("http://", "ftp://")] {
        served.write(bad);
        let line = served.logged("keeping the previous one").await;
        assert_eq!(line["level"], "ERROR");
        let models = served.ask(get("/v1/models")).await.json();
        assert_eq!(models["data"][0]["id"], "tiny", "{bad}");
    }
    served.write(&routes(&[route("tiny", &upstream.url(), ""), route("other", &upstream.url(), "")]));
    served.logged("configuration reloaded").await;
    assert_eq!(served.ask(get("/v1/models")).await.json()["data"][0]["id"], "other");
    // SIGHUP logs the reload as well, even without changes.
    served.signal(Signal::HUP);
    served.logged("configuration reloaded").await;
    upstream.wake();
    upstream.call().await.echo().await;
    assert_eq!(held.response().await.json()["text"], "held");
    served.signal(Signal::INT);
    assert_eq!(soon("the exit", served.child.wait()).await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn killing_the_proxy_leaves_no_model_server_behind() {
    let pids = tempfile::NamedTempFile::new().unwrap();
    // A server with a child process, as vLLM has for its engine.
    let script = r#"sleep 600 & echo $! >> "$1"; echo $$ >> "$1"; exec "$2" sim --port "$3""#;
    let command =
        serde_json::json!(["sh", "-c", script, "-", pids.path(), env!("CARGO_BIN_EXE_anteroom"), "{port}"]);
    let route = format!(
        "{{ name: tiny, match: {{ models: [tiny] }}, target: {{ process: {{ command: {command} }} }} }}"
    );
    let mut served = LoggedProcess::start(&format!(
        "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nallowedHosts: [\"*\"]\nroutes: [{route}]"
    ))
    .await;
    let body = r#"{"model":"tiny","messages":[{"role":"user","content":"x"}]}"#;
    assert_eq!(served.ask(post(CHAT, body)).await.status(), 200);
    let pids: Vec<Pid> = fs::read_to_string(pids.path())
        .unwrap()
        .lines()
        .map(|line| Pid::from_raw(line.parse().unwrap()).unwrap())
        .collect();
    assert_eq!(pids.len(), 2);
    let lives = |pid: &Pid| test_kill_process(*pid).is_ok();
    assert!(pids.iter().all(lives));
    served.signal(Signal::KILL);
    soon("the proxy's end", served.child.wait()).await.unwrap();
    until("the model server and its child to end", async || !pids.iter().any(lives)).await;
}

/// The log from a cold start to the end of its server.
#[tokio::test]
async fn cold_start_and_end_of_a_server_are_logged() {
    let route = |more: &str| {
        let command = serde_json::json!([env!("CARGO_BIN_EXE_anteroom"), "sim", "--port", "{port}"]);
        format!(
            "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nallowedHosts: [\"*\"]\nroutes: [{{ name: tiny, \
             target: {{ process: {{ command: {command}, {more} }} }} }}]"
        )
    };
    let mut served = LoggedProcess::start(&route("idleTimeout: 100ms")).await;
    let body = r#"{"model":"tiny","messages":[{"role":"user","content":"x"}]}"#;
    assert_eq!(served.ask(post(CHAT, body)).await.status(), 200);
    let record = served.logged("cold start").await;
    assert!(record["phases.load_ms"].as_u64().is_some_and(|load| load > 0), "{record}");
    assert_eq!(record["phases.pull_ms"], Value::Null);
    let end = served.logged("model server ended").await;
    assert_eq!((&end["route"], &end["reason"]), (&"tiny".into(), &"idle".into()));
    assert!(end["ran_s"].is_u64(), "{end}");
    // A running server ends with its route, with its target and with the proxy.
    served.write(&route("idleTimeout: 10m"));
    served.logged("configuration reloaded").await;
    for (file, reason) in [
        (route("idleTimeout: 9m"), "the target was replaced"),
        (route("idleTimeout: 9m").replace("name: tiny", "name: other"), "the route was removed"),
    ] {
        assert_eq!(served.ask(post(CHAT, body)).await.status(), 200);
        served.write(&file);
        assert_eq!(served.logged("model server ended").await["reason"], reason);
    }
    assert_eq!(served.ask(post(CHAT, body)).await.status(), 200);
    served.signal(Signal::INT);
    assert_eq!(served.logged("model server ended").await["reason"], "the proxy was stopped");
}

#[tokio::test]
async fn limit_of_open_files_is_reported_once_per_value() {
    const SUBJECT: &str = "exceeds the limit of open files";
    let config = |connections: usize| {
        format!(
            "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nlimits: {{ maxConnections: {connections} }}\n{UNREACHABLE_ROUTE_CONFIG}\n"
        )
    };
    let folder = tempfile::tempdir().unwrap();
    let direct = command(&folder, &[]);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "ulimit -n 256; exec \"$@\"", "-"])
        .arg(direct.as_std().get_program())
        .args(direct.as_std().get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut served = LoggedProcess::spawn(folder, &config(1000), limited).await;
    for (connections, is_reported) in [(1000, false), (2000, true), (2000, false)] {
        served.write(&config(connections));
        served.signal(Signal::HUP);
        let mut reported = false;
        loop {
            let line = soon("a reload", served.log.next_line()).await.unwrap().unwrap();
            reported |= line.contains(SUBJECT);
            if line.contains("configuration reloaded") {
                break;
            }
        }
        assert_eq!(reported, is_reported, "{connections}");
    }
}

#[tokio::test]
async fn requests_are_in_the_access_log_if_it_is_on() {
    let mut upstream = TestUpstream::warm().await;
    let config = format!("log: {{ access: true }}\n{}", routes(&[route("tiny", &upstream.url(), "")]));
    let mut served = LoggedProcess::start(&config).await;
    let mut client = Wire::connect(served.address).await;
    client.send(chat("one")).await;
    upstream.call().await.echo().await;
    let response = client.response().await;
    let line = served.logged("access").await;
    assert_eq!(line["request_id"], response.get("x-request-id").unwrap());
    for (field, value) in
        [("route", "tiny"), ("model", "tiny"), ("method", "POST"), ("path", CHAT), ("outcome", "completed")]
    {
        assert_eq!(line[field], value, "{line}");
    }
    assert_eq!(line["status"], 200);
    assert!(line["waited_ms"].is_u64() && line["total_ms"].is_u64(), "{line}");
    // A rejected request is logged without its query.
    assert_eq!(served.ask(get("/v1/nothing?key=secret")).await.status(), 404);
    let line = served.logged("access").await;
    assert_eq!((&line["path"], &line["status"]), (&"/v1/nothing".into(), &404.into()));
    assert_eq!((&line["outcome"], &line["route"]), (&"unknown_path".into(), &Value::Null));
    // The access log is disabled by a reload.
    served.write(&routes(&[route("tiny", &upstream.url(), "")]));
    served.logged("configuration reloaded").await;
    assert_eq!(served.ask(get("/v1/nothing")).await.status(), 404);
    served.signal(Signal::INT);
    loop {
        let line = soon("the log", served.log.next_line()).await.unwrap().unwrap();
        assert!(!line.contains(r#""access""#), "{line}");
        if line.contains(r#""stopped""#) {
            break;
        }
    }
}
