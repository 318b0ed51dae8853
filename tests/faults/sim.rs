//! `anteroom sim` as a process at a fixed address, which the next process takes over.

use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    law,
    served::ANTEROOM,
    support::{
        until,
        upstream::Port,
        wire::{CHAT, post},
    },
};

/// Address for model servers, of which at most one runs at a time.
pub struct SimAddress {
    port: Port,
}

/// Model server process, killed on drop.
pub struct SimProcess {
    child: Child,
    address: std::net::SocketAddr,
}

/// Returns a chat request for the sim.
pub fn prompt(text: &str) -> String {
    post(CHAT, &body(text, false))
}

/// Returns a chat request with a streaming response.
pub fn streaming(text: &str) -> String {
    post(CHAT, &body(text, true))
}

fn body(text: &str, stream: bool) -> String {
    format!(r#"{{"model":"tiny","stream":{stream},"messages":[{{"role":"user","content":"{text}"}}]}}"#)
}

// === impl SimAddress ===

impl SimAddress {
    pub fn reserve() -> Self {
        Self { port: Port::reserve() }
    }

    pub fn url(&self) -> String {
        self.port.url()
    }

    /// Starts a model server at this address.
    pub fn start(&self, arguments: &[&str]) -> SimProcess {
        let address: std::net::SocketAddr = self.url()["http://".len()..].parse().unwrap();
        let mut command = Command::new(ANTEROOM);
        command.args(["sim", "--port", &address.port().to_string()]).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        SimProcess { child: command.spawn().unwrap(), address }
    }

    /// Starts a model server and waits until it listens.
    pub async fn up(&self, arguments: &[&str]) -> SimProcess {
        let sim = self.start(arguments);
        until("a model server", async || tokio::net::TcpStream::connect(sim.address).await.is_ok()).await;
        sim
    }
}

// === impl SimProcess ===

impl SimProcess {
    /// Waits until this many requests are running.
    pub async fn runs(&self, number: u64) {
        until(&format!("{number} to run"), async || self.metric("vllm:num_requests_running").await == number)
            .await;
    }

    /// Returns the number of requests completed successfully.
    pub async fn answered(&self) -> u64 {
        self.metric("vllm:request_success_total").await
    }

    async fn metric(&self, name: &str) -> u64 {
        let text = law::ask(self.address, "/metrics").await.text();
        let series = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        series.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64).sum()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Sends SIGSTOP and waits until all threads are stopped: until then the process may still respond.
    pub async fn stop(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        until("it to be stopped", async || {
            std::fs::read_dir(&tasks).unwrap().all(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
                stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
            })
        })
        .await;
    }

    /// Sends SIGKILL, as the kernel's out-of-memory killer does.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }
}

impl Drop for SimProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
