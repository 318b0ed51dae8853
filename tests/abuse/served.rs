//! `anteroom serve` as a process, and connections to it from many addresses.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
};

use rustix::process::{Resource, getrlimit};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::{TcpSocket, TcpStream},
    process::{Child, ChildStderr, Command},
};

use crate::support::{route, routes, soon};

/// `anteroom serve` in its own process, so that its files and memory can be measured.
pub struct ServeProcess {
    pub child: Child,
    log: Lines<BufReader<ChildStderr>>,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    _folder: tempfile::TempDir,
}

// === impl ServeProcess ===

impl ServeProcess {
    /// Starts the process with these limits, after the shell command `ulimit`.
    pub async fn start(ulimit: &str, limits: &str, url: &str) -> Self {
        Self::with_routes(ulimit, limits, &[route("tiny", url, "")]).await
    }

    /// Starts the process with these routes.
    pub async fn with_routes(ulimit: &str, limits: &str, all: &[String]) -> Self {
        let config = format!("limits: {{ {limits} }}\n{}", routes(all));
        Self::start_with(ulimit, &config).await
    }

    /// Starts the process with this configuration.
    pub async fn start_with(ulimit: &str, config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("anteroom.yaml");
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

    /// Waits until the process listens. Returns its log up to then.
    pub async fn listens(&mut self) -> String {
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

    /// Resident memory in bytes: `VmRSS:` is the current value, `VmHWM:` the peak.
    pub fn memory(&self, what: &str) -> usize {
        let status = self.proc("status");
        let line = status.lines().find(|line| line.starts_with(what)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    }

    /// Returns the soft limit of open files.
    pub fn files(&self) -> usize {
        let limits = self.proc("limits");
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        line.split_whitespace().nth(3).unwrap().parse().unwrap()
    }
}

/// Returns a loopback address from 127.1.0.1 upwards: one for each 250 connections.
pub fn source(number: usize) -> SocketAddr {
    let number = u32::try_from(number / 250).unwrap();
    SocketAddr::from((Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + number), 0))
}

pub async fn connect_from(source: SocketAddr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(source).unwrap();
    soon("a connection", socket.connect(to)).await.unwrap()
}

/// Returns the number of files that this process may open.
pub fn files() -> usize {
    getrlimit(Resource::Nofile).current.map_or(1 << 20, |files| usize::try_from(files).unwrap())
}
