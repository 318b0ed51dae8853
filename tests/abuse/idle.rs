//! Connections that do nothing: many of them, from one source or from many, and more than there are files for.

use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
};

use rustix::process::{Resource, getrlimit};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    net::{TcpSocket, TcpStream},
    process::{Child, ChildStderr, Command},
    task::JoinSet,
};

use crate::support::{
    Proxy, Upstream, Wire, route, routes, soon, until,
    wire::{chat, get},
};

/// `anteroom serve` in a process of its own, whose files and memory are only its own.
struct Served {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
    address: SocketAddr,
    admin: SocketAddr,
    _folder: tempfile::TempDir,
}

// === impl Served ===

impl Served {
    /// With these limits, and a shell's `ulimit` before it.
    async fn start(ulimit: &str, limits: &str, url: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("anteroom.yaml");
        let config = format!("limits: {{ {limits} }}\n{}", routes(&[route("tiny", url, "")]));
        fs::write(&path, config).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", &format!("{ulimit}\nexec \"$@\""), "-", env!("CARGO_BIN_EXE_anteroom")])
            .args(["serve", "--log-format", "json", "--config"])
            .arg(&path)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        let nowhere = SocketAddr::from(([0; 4], 0));
        Self { child, log, address: nowhere, admin: nowhere, _folder: folder }
    }

    /// Waits until it listens: what it said before that.
    async fn listens(&mut self) -> String {
        let mut said = String::new();
        loop {
            let line =
                soon("a line", self.log.next_line()).await.unwrap().unwrap_or_else(|| panic!("{said}"));
            let json: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
            if json["message"] == "listening" {
                let address = |key: &str| json[key].as_str().unwrap().parse().unwrap();
                (self.address, self.admin) = (address("address"), address("admin"));
                return said;
            }
            said += &line;
        }
    }

    fn proc(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.child.id().unwrap())).unwrap()
    }

    /// Resident memory, in bytes.
    fn memory(&self) -> usize {
        let status = self.proc("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    }

    /// The soft limit to its open files.
    fn files(&self) -> usize {
        let limits = self.proc("limits");
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        line.split_whitespace().nth(3).unwrap().parse().unwrap()
    }
}

/// The `number`th address of 127.0.0.0/8 but for the first few, 250 connections from each.
fn source(number: usize) -> SocketAddr {
    let number = u32::try_from(number / 250).unwrap();
    SocketAddr::from((Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + number), 0))
}

async fn connect_from(source: SocketAddr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(source).unwrap();
    soon("a connection", socket.connect(to)).await.unwrap()
}

/// So many connections, some hundred at a time. Every other one asks for something, and is kept alive after that.
async fn connect(count: usize, to: SocketAddr) -> Vec<Wire> {
    let mut open = Vec::with_capacity(count);
    let mut opening = JoinSet::new();
    for number in 0..count {
        opening.spawn(async move {
            let stream = connect_from(source(number), to).await;
            let mut client = Wire { stream, buf: Vec::new() };
            if number % 2 == 0 {
                assert_eq!(client.ask(get("/health")).await.status(), 200);
            }
            client
        });
        if opening.len() >= 200 {
            open.push(opening.join_next().await.unwrap().unwrap());
        }
    }
    while let Some(client) = opening.join_next().await {
        open.push(client.unwrap());
    }
    open
}

/// Opens so many idle connections: others are served, memory stays within bounds, and all are closed in their time.
async fn idle(count: usize, timeout: &str) {
    let mut upstream = Upstream::warm().await;
    let limits = format!("headerTimeout: {timeout}, idleTimeout: {timeout}");
    let mut served = Served::start("", &limits, &upstream.url()).await;
    served.listens().await;
    Wire::connect(served.address).await.ask(get("/health")).await;
    let before = served.memory();
    let open = connect(count, served.address).await;
    let each = served.memory().saturating_sub(before) / count;
    let _ = writeln!(std::io::stderr(), "{count} idle connections: {each} bytes of memory each");

    let mut client = Wire::connect(served.address).await;
    client.send(chat("new")).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200, "a new one is served");
    assert_eq!(Wire::connect(served.admin).await.ask(get("/readyz")).await.status(), 200);

    // A read buffer and a write buffer of 8 KiB at most, a task, and what the allocator keeps.
    assert!(each < 32 << 10, "{each} bytes of memory for each of {count} connections");
    for mut client in open {
        // A reset is an end as well.
        let mut rest = Vec::new();
        let _ = soon("the end of an idle connection", client.stream.read_to_end(&mut rest)).await;
    }
}

#[tokio::test]
async fn thousands_of_idle_connections_cost_little_and_go_at_their_time() {
    anteroom::app::raise_file_limit();
    idle(2000.min(files() / 4), "4s").await;
}

/// The same in full: `.ci/run abuse`. Both ends have a process each, and so as many files as one may have.
#[tokio::test]
#[ignore = "a minute, and 100,000 files in each of two processes"]
async fn a_hundred_thousand_idle_connections() {
    anteroom::app::raise_file_limit();
    // The proxy keeps up to 4,096 of its files for other things, and we need some as well.
    let count = 100_000.min(files().saturating_sub(4096 + 500));
    if count < 100_000 {
        let _ =
            writeln!(std::io::stderr(), "{count} instead of 100000: a process may have {} files", files());
    }
    idle(count, "20s").await;
}

/// As many files as this process may have open.
fn files() -> usize {
    getrlimit(Resource::Nofile).current.map_or(1 << 20, |files| usize::try_from(files).unwrap())
}

#[tokio::test]
async fn the_soft_limit_to_open_files_is_raised_and_a_hard_one_that_is_too_low_is_told() {
    let upstream = Upstream::warm().await.automatic(|call| call.echo());
    let mut served = Served::start("ulimit -Sn 128", "maxConnections: 100", &upstream.url()).await;
    let said = served.listens().await;
    assert!(!said.contains("open files"), "100 connections fit: {said}");
    assert!(served.files() > 128, "{}", served.files());

    let mut served = Served::start("ulimit -n 200", "", &upstream.url()).await;
    let said = served.listens().await;
    assert!(said.contains("open files") && said.contains("ulimit"), "{said}");
    assert_eq!(served.files(), 200);
    // Twice as many as there are files: those that are in are served, and so is whoever looks at the metrics.
    let mut open = Vec::new();
    for number in 0..400 {
        open.push(connect_from(source(number), served.address).await);
    }
    let mut first = Wire { stream: open.swap_remove(0), buf: Vec::new() };
    for _ in 0..3 {
        assert_eq!(first.ask(chat("in")).await.status(), 200, "there are files for connections to endpoints");
        assert_eq!(Wire::connect(served.admin).await.ask(get("/readyz")).await.status(), 200);
    }
    // Those that go make room.
    drop(open);
    assert_eq!(Wire::connect(served.address).await.ask(chat("next")).await.status(), 200);
}

#[tokio::test]
async fn one_source_has_no_more_connections_than_it_may() {
    let upstream = Upstream::warm().await;
    let config = format!(
        "limits: {{ maxConnectionsPerSource: 3 }}\n{}",
        routes(&[route("tiny", &upstream.url(), "")])
    );
    let proxy = Proxy::start(&config).await;
    let (one, other) = (source(0), source(250));
    let from = async |source| Wire { stream: connect_from(source, proxy.address).await, buf: Vec::new() };
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut client = from(one).await;
        assert_eq!(client.ask(get("/health")).await.status(), 200);
        open.push(client);
    }
    assert_eq!(from(one).await.end().await, b"", "the fourth is closed without a word");
    let mut another = from(other).await;
    assert_eq!(another.ask(get("/health")).await.status(), 200, "others are served");
    open.pop();
    until("a place to be free", async || proxy.shared.connections.open() == 3).await;
    assert_eq!(from(one).await.ask(get("/health")).await.status(), 200);
    proxy.stop(&[]).await;
}
