//! A process with the chart's memory limit under all attacks that make it hold bytes: it stays below the limit and
//! serves other clients meanwhile.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anteroom::domain::ByteCount;
use tokio::{io::AsyncWriteExt, task::JoinSet, time::timeout};

use crate::{
    frames::{DATA, END_HEADERS, HEADERS, PREFACE, block, field, frame, get, post, post_fields, settings},
    served::{ServeProcess, connect_from, files, source},
    support::{
        TestUpstream, Wire, route, soon,
        upstream::answer,
        wire::{self, CHAT, chat, post_with},
    },
};

/// Bytes that an attacking client sends; the client reads nothing.
type AttackBytes = fn(usize) -> Vec<u8>;

/// Time after which an attacking client gives up writing.
const WRITE_STALL_TIMEOUT: Duration = Duration::from_secs(2);

/// SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113, section 6.5.2).
const INITIAL_WINDOW_SIZE: u16 = 4;

/// Attacks with the number of clients that would fill half of the memory without limits.
const ATTACKS: [(&str, usize, AttackBytes); 5] = [
    ("partial heads", 10_000, |_| format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(60_000)).into()),
    ("open header blocks", 6_000, |_| {
        let begins = [block(&post_fields(CHAT)), field("x", "x".repeat(15_000))].concat();
        [PREFACE, &settings(&[]), &frame(HEADERS, 0, 1, &begins)].concat()
    }),
    ("unread answers", 100, |_| {
        let path = format!("/{}", "a".repeat(4000));
        let asked: Vec<u8> = (0..1000).flat_map(|number| get(2 * number + 1, &path)).collect();
        [PREFACE, &settings(&[(INITIAL_WINDOW_SIZE, 0)]), &asked[..]].concat()
    }),
    ("streams without bodies", 100, |_| {
        let head = [block(&post_fields(CHAT)), field("x", "x".repeat(10_000))].concat();
        let asked: Vec<u8> =
            (0..1000).flat_map(|number| frame(HEADERS, END_HEADERS, 2 * number + 1, &head)).collect();
        let part = frame(DATA, 0, 1, b"{");
        [PREFACE, &settings(&[]), &asked[..], &part].concat()
    }),
    ("bodies short of their end", 200, |_| {
        let mut body = post_with(CHAT, &[], &"x".repeat(8 << 20)).into_bytes();
        body.truncate(body.len() - 300);
        body
    }),
];

/// Memory cgroup of this test, below the cgroup of this process.
struct Cgroup(PathBuf);

// === impl Cgroup ===

impl Cgroup {
    /// Returns the reason if no group can be created, as in a container without the rights to do so.
    fn new(bytes: usize) -> Result<Self, String> {
        let groups = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
        let version_1 = groups.lines().find_map(|line| line.split_once(":memory:"));
        let version_2 = groups.lines().find_map(|line| line.strip_prefix("0::"));
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("anteroom-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut tried = Vec::new();
        for (mount, path, file) in [
            ("/sys/fs/cgroup/memory", version_1.map(|(_, path)| path), "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", version_2, "memory.max"),
        ] {
            let Some(path) = path else { continue };
            let folder = PathBuf::from(format!("{mount}{path}/{name}"));
            let made = fs::create_dir(&folder);
            let group = Self(folder);
            // Opened, not created: in a folder that is no memory cgroup, a file of this name would limit nothing.
            let limit = made.and_then(|()| fs::OpenOptions::new().write(true).open(group.0.join(file)));
            match limit.and_then(|mut limit| limit.write_all(bytes.to_string().as_bytes())) {
                Ok(()) => return Ok(group),
                Err(error) => tried.push(format!("{}: {error}", group.0.display())),
            }
        }
        Err(tried.join("; "))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The process may take a moment to exit; an empty group left behind is harmless.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Returns `resources.limits.memory` of the chart, given in Kubernetes notation.
fn memory_of_chart() -> usize {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/chart/anteroom/values.yaml");
    let values: serde_json::Value = serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let memory = values.pointer("/resources/limits/memory").unwrap().as_str().unwrap();
    format!("{memory}B").parse::<ByteCount>().unwrap().get()
}

/// Connects `count` clients, each of which sends as many of its bytes as are accepted, and keeps the connections.
async fn attack(count: usize, to: SocketAddr, bytes: AttackBytes) -> Vec<Wire> {
    let mut open = Vec::with_capacity(count);
    let mut opening = JoinSet::new();
    for number in 0..count {
        opening.spawn(async move {
            let mut stream = connect_from(source(number), to).await;
            // The proxy may close the connection or stop reading.
            let _ = timeout(WRITE_STALL_TIMEOUT, stream.write_all(&bytes(number))).await;
            Wire { stream, buf: Vec::new() }
        });
        if opening.len() >= 100 {
            open.push(opening.join_next().await.unwrap().unwrap());
        }
    }
    while let Some(client) = opening.join_next().await {
        open.push(client.unwrap());
    }
    open
}

/// Starts a process with the chart's memory limit, in a cgroup of its own if one can be created. The process must be
/// dropped first (bindings of a pattern are dropped from the last to the first), as only an empty group can be removed.
async fn start_limited(memory: usize, routes: &[String]) -> (Option<Cgroup>, ServeProcess) {
    anteroom::app::raise_file_limit();
    let group = Cgroup::new(memory);
    let (prelude, limits) = match &group {
        Ok(group) => {
            say(format!("limited by the cgroup {}", group.0.display()));
            (format!("echo $$ > {}/cgroup.procs || exit 1", group.0.display()), "")
        }
        // Without a cgroup, sets the values derived from the memory limit; a test of the configuration checks them.
        Err(error) => {
            say(format!("no cgroup can be made, so only the peak is measured: {error}"));
            (String::new(), "maxBufferedBytes: 256MiB, maxConnections: 6553")
        }
    };
    let mut served = ServeProcess::with_routes(&prelude, limits, routes).await;
    let said = served.listens().await;
    assert!(!said.contains("clients can make this process take"), "{said}");
    (group.ok(), served)
}

fn say(text: String) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Sends one request over a new connection and returns the status of its response.
async fn ask_as_bystander(to: SocketAddr, request: &str) -> u16 {
    let stream = soon("a place", connect_from(source(30_000), to)).await;
    stream.set_nodelay(true).unwrap();
    let mut client = Wire { stream, buf: Vec::new() };
    client.send(request).await;
    client.response().await.status()
}

#[tokio::test]
#[ignore = "run by `.ci/run abuse`: a minute, and 10,000 files in each of two processes"]
async fn attacks_stay_within_chart_memory() {
    let memory = memory_of_chart();
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let (_group, mut served) = start_limited(memory, &[route("tiny", &upstream.url(), "")]).await;
    for (name, count, bytes) in ATTACKS {
        // The process reserves up to 4,096 files for other uses.
        let count = count.min(files().saturating_sub(4096 + 500));
        let open = attack(count, served.address, bytes).await;
        assert_eq!(ask_as_bystander(served.address, &chat("honest")).await, 200, "beside {name}");
        let (now, peak) = (served.memory("VmRSS:"), served.memory("VmHWM:"));
        say(format!("{count} × {name}: {} MiB, at most {} MiB so far", now >> 20, peak >> 20));
        assert!(peak < memory, "{name}: {peak} of {memory} bytes");
        drop(open);
    }
    assert!(served.child.try_wait().unwrap().is_none(), "it lives");
}

/// All attacks at once, plus clients that do not read large responses of a model server. The number of clients is below
/// `maxConnections`, so that a bystander, which has its own route, gets a connection.
#[tokio::test]
#[ignore = "run by `.ci/run abuse`: a minute, and 6,000 files in each of two processes"]
async fn concurrent_attacks_stay_within_chart_memory() {
    const UNREAD_RELAYS: usize = 600;
    const UNREAD_STREAMS: (usize, u32) = (20, 50);
    let memory = memory_of_chart();
    let upstream = TestUpstream::warm().await.automatic(|call| call.echo());
    let bytes = Arc::new(answer("200 OK", &[], &"x".repeat(8 << 20)));
    let large = TestUpstream::warm().await.automatic(move |mut call| {
        let bytes = bytes.clone();
        async move {
            call.body().await;
            // Fails when the client's connection breaks.
            let _ = call.wire.stream.write_all(bytes.as_bytes()).await;
        }
    });
    let wide = "concurrency: { max: 2000, rampStart: 2000 }, hold: { maxRequests: 2000 }";
    let routes = [
        route("tiny", &upstream.url(), wide),
        route("large", &large.url(), wide),
        route("honest", &upstream.url(), ""),
    ];
    let (_group, mut served) = start_limited(memory, &routes).await;
    let to = served.address;
    let body =
        |model: &str| format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"hi"}}]}}"#);
    let honest = post_with(CHAT, &[], &body("honest"));
    assert_eq!(ask_as_bystander(to, &honest).await, 200);

    let mut attacks = JoinSet::new();
    for (name, count, bytes) in ATTACKS {
        // Fewer clients than alone, but more bytes than each kind may take: with 256 MiB for bodies, 150 and 38 MB of heads, 82 MB
        // of answers (32 MiB), 200 MB of streams and 336 MB of bodies (192 MiB together). Reading all of it must leave a debug
        // build time for the bystander.
        let count = if count > 1000 { count.min(2500) } else { count / 5 };
        attacks.spawn(async move { (name, attack(count, to, bytes).await) });
    }
    attacks.spawn(async move {
        let asks: AttackBytes = |_| post_with(CHAT, &[], r#"{"model":"large"}"#).into_bytes();
        ("unread relays over HTTP/1.1", attack(UNREAD_RELAYS, to, asks).await)
    });
    attacks.spawn(async move {
        let asks: AttackBytes = |_| {
            let asks: Vec<u8> = (0..UNREAD_STREAMS.1)
                .flat_map(|number| post(2 * number + 1, CHAT, r#"{"model":"large"}"#))
                .collect();
            [PREFACE, &settings(&[(INITIAL_WINDOW_SIZE, 1000)]), &asks[..]].concat()
        };
        ("unread relays over HTTP/2", attack(UNREAD_STREAMS.0, to, asks).await)
    });
    let mut open = Vec::new();
    let mut answered = 0;
    // Number of requests to send after the last attack has started: together they take as long as an unread relay may
    // last while memory is short.
    let mut rest = 100;
    while rest > 0 {
        match attacks.try_join_next() {
            Some(attack) => open.push(attack.unwrap()),
            None if attacks.is_empty() => rest -= 1,
            None => {}
        }
        assert_eq!(ask_as_bystander(to, &honest).await, 200, "request {answered}");
        answered += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let metrics = Wire::connect(served.admin).await.ask(wire::get("/metrics")).await.text();
    for line in metrics.lines().filter(|line| line.starts_with("anteroom_memory_bytes")) {
        say(line.to_owned());
    }
    let (now, peak) = (served.memory("VmRSS:"), served.memory("VmHWM:"));
    say(format!(
        "all attacks at once: {} MiB, at most {} MiB; {answered} answers beside them",
        now >> 20,
        peak >> 20
    ));
    assert!(peak < memory, "{peak} of {memory} bytes");
    let stalled = metrics.lines().any(|line| line.contains("client_stalled") && !line.ends_with(" 0"));
    assert!(stalled, "unread relays end: {metrics}");
    assert!(served.child.try_wait().unwrap().is_none(), "it lives");
}
