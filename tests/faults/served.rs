//! `anteroom serve` as a process, observed from outside.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::{
    law::{self, ProxyCounts},
    marked::ProcessMark,
    support::{Wire, until, wire::WireResponse},
};

/// The executable under test.
pub const ANTEROOM: &str = env!("CARGO_BIN_EXE_anteroom");

/// Proxy process. Dropping it kills the process; its log is collected.
pub struct ProxyProcess {
    child: Child,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    folder: tempfile::TempDir,
    /// Finds the process and all its descendants, even after they are reparented.
    mark: ProcessMark,
    log: Arc<Mutex<Vec<Value>>>,
    /// Lock that must be held to read the log from the pipe.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// System resources of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    pub descriptors: usize,
    pub threads: usize,
}

// === impl ProxyProcess ===

impl ProxyProcess {
    pub async fn start(config: &str) -> Self {
        Self::spawn(config, |folder| {
            let mut command = Command::new(ANTEROOM);
            command.args(arguments(folder));
            command
        })
        .await
    }

    /// Starts a proxy with this limit of open files.
    pub async fn with_descriptors(config: &str, number: u64) -> Self {
        Self::spawn(config, |folder| {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("ulimit -n {number}; exec \"$0\" \"$@\""), ANTEROOM]);
            command.args(arguments(folder));
            command
        })
        .await
    }

    /// Starts a proxy with this command, which gets the folder of the configuration.
    pub async fn spawn(config: &str, command: impl FnOnce(&tempfile::TempDir) -> Command) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("anteroom.yaml"), config).unwrap();
        let mark = ProcessMark::new();
        let mut command = command(&folder);
        command.env_remove("RUST_LOG").stdout(Stdio::null());
        let (name, value) = mark.variable();
        let child = command.env(name, value).stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = tokio::process::ChildStderr::from_std(child.stderr.take().unwrap()).unwrap();
        let lines = log.clone();
        let turn = Arc::new(tokio::sync::Mutex::new(()));
        let reader = turn.clone();
        tokio::spawn(async move {
            let mut read = BufReader::new(stderr).lines();
            loop {
                let _turn = reader.lock().await;
                let Ok(Some(line)) = read.next_line().await else { return };
                lines.lock().push(serde_json::from_str(&line).unwrap_or(Value::String(line)));
            }
        });
        let none = SocketAddr::from(([0; 4], 0));
        let mut served = Self { child, address: none, admin: none, folder, mark, log, turn };
        let listening = served.logged("listening").await;
        let address = |key: &str| listening[key].as_str().unwrap().parse().unwrap();
        (served.address, served.admin) = (address("address"), address("admin"));
        served
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("anteroom.yaml")
    }

    /// Replaces the configuration atomically, as editors and kubelets do.
    pub fn write(&self, config: &str) {
        fs::write(self.path().with_extension("new"), config).unwrap();
        fs::rename(self.path().with_extension("new"), self.path()).unwrap();
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    // --- log ---

    /// Returns the number of log lines so far with this message.
    pub fn count_log_lines(&self, message: &str) -> usize {
        self.log.lock().iter().filter(|line| says(line, message)).count()
    }

    /// Waits for the first log line with this message.
    pub async fn logged(&self, message: &str) -> Value {
        until(message, async || self.count_log_lines(message) > 0).await;
        self.log.lock().iter().find(|line| says(line, message)).cloned().unwrap()
    }

    /// Stops reading the log after the next line, until the guard is dropped.
    pub async fn unread_log(&self) -> tokio::sync::OwnedMutexGuard<()> {
        self.turn.clone().lock_owned().await
    }

    /// Returns the whole log, for failure messages.
    pub fn log(&self) -> String {
        self.log.lock().iter().map(|line| format!("{line}\n")).collect()
    }

    pub async fn ask(&self, request: impl AsRef<[u8]>) -> WireResponse {
        Wire::connect(self.address).await.ask(request).await
    }

    /// Connects a client and sends a request.
    pub async fn sent(&self, request: impl AsRef<[u8]>) -> Wire {
        let mut client = Wire::connect(self.address).await;
        client.send(request).await;
        client
    }

    /// Returns the JSON of a path on the admin listener.
    pub async fn admin(&self, path: &str) -> Value {
        law::ask(self.admin, path).await.json()
    }

    /// Returns the route `tiny` from the admin API.
    pub async fn tiny(&self) -> Value {
        let routes = self.admin("/api/v1/routes").await;
        let routes = routes["routes"].as_array().unwrap();
        routes.iter().find(|route| route["name"] == "tiny").cloned().unwrap_or_default()
    }

    pub async fn held(&self, number: u64) {
        until(&format!("{number} to be held"), async || self.tiny().await["held"] == number).await;
    }

    pub async fn in_flight(&self, number: u64) {
        until(&format!("{number} in flight"), async || self.tiny().await["in_flight"] == number).await;
    }

    pub async fn counts(&self) -> ProxyCounts {
        law::counts(self.admin).await
    }

    // --- resources ---

    /// Returns the current resources.
    pub fn resources(&self) -> Resources {
        let proc = PathBuf::from(format!("/proc/{}", self.pid().as_raw_nonzero()));
        let count = |what: &str| fs::read_dir(proc.join(what)).unwrap().count();
        Resources { descriptors: count("fd"), threads: count("task") }
    }

    /// Waits until the process has no more resources than before.
    pub async fn await_released_resources(&self, before: Resources) {
        until(&format!("{before:?}"), async || {
            let now = self.resources();
            now.descriptors <= before.descriptors && now.threads <= before.threads
        })
        .await;
    }

    /// Returns the CPU time used, in kernel ticks.
    pub fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid().as_raw_nonzero())).unwrap();
        // The name in front may contain anything except `) `.
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Returns the model servers started by the proxy.
    pub fn model_servers(&self) -> Vec<Pid> {
        let is_server = |command: &[String]| command.get(1).is_some_and(|word| word == "sim");
        let all = self.mark.processes().into_iter();
        all.filter(|process| is_server(&process.command)).map(|process| process.id).collect()
    }

    // --- end ---

    /// Waits until all requests have ended, checks the law, then stops the proxy: its final log line must match the
    /// counts, and none of its child processes may be left.
    pub async fn stop(mut self) -> ProxyCounts {
        let counts = law::holds(self.admin).await;
        self.signal(Signal::INT);
        let status = self.exited().await;
        assert_eq!(status.code(), Some(0), "{}", self.log());
        let last = self.logged("stopped").await;
        let sum: u64 = counts.outcomes.values().sum();
        assert_eq!((last["admitted"].as_u64(), last["held"].as_u64()), (Some(sum), Some(0)), "{last}");
        assert_eq!(last["in_flight"].as_u64(), Some(0), "{last}");
        let left = self.mark.processes();
        assert!(left.is_empty(), "left behind: {left:?}");
        counts
    }

    /// Waits for the process to exit.
    pub async fn exited(&mut self) -> std::process::ExitStatus {
        let mut status = None;
        until("its end", async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }
}

impl Drop for ProxyProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn arguments(folder: &tempfile::TempDir) -> Vec<String> {
    let path = folder.path().join("anteroom.yaml");
    let path = path.to_str().unwrap();
    ["serve", "--log-format", "json", "--config", path].map(str::to_owned).into()
}

fn says(line: &Value, message: &str) -> bool {
    line["message"].as_str().is_some_and(|said| said.contains(message))
}
