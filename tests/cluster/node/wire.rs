//! A machine with its own network and a link that can be cut. Packets to its pods are then lost without a FIN or reset,
//! as when a machine loses power.

use std::{
    net::Ipv4Addr,
    process::Stdio,
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use tokio::{
    process::{Child, Command},
    time::sleep,
};

use super::FIRST_POD_HOST_NUMBER;
use crate::wait;

/// Link to one machine. Dropping it removes the machine's network, which peers notice.
pub(super) struct NodeLink {
    /// Idle process that keeps the network namespace alive.
    holder: Child,
    number: u8,
    last: AtomicU8,
}

// === impl NodeLink ===

impl NodeLink {
    /// Creates the link to machine `number`, whose pods are at 10.78.`number`.50 and above.
    pub(super) async fn create_link(number: u8) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--net", "--", "sleep", "infinity"]).stdin(Stdio::null()).kill_on_drop(true);
        let wire =
            Self { holder: command.spawn().unwrap(), number, last: AtomicU8::new(FIRST_POD_HOST_NUMBER) };
        let process = wire.process();
        let inside = format!("/proc/{process}/ns/net");
        let apart = async {
            let network = |link: &str| std::fs::read_link(link).ok();
            while network(&inside).is_none_or(|theirs| Some(theirs) == network("/proc/self/ns/net")) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        wait::within("a network of its own", wait::WAIT_LIMIT, apart).await;
        ip(&format!("link add wire{number} type veth peer name eth0 netns {process}")).await;
        ip(&format!("address add 10.79.{number}.1/24 dev wire{number}")).await;
        ip(&format!("link set wire{number} up")).await;
        ip(&format!("route add 10.78.{number}.0/24 dev wire{number}")).await;
        wire.ip("link set lo up").await;
        wire.ip(&format!("address add 10.79.{number}.2/24 dev eth0")).await;
        wire.ip("link set eth0 up").await;
        // Makes the whole range local without adding each address.
        wire.ip(&format!("route add local 10.78.{number}.0/24 dev lo")).await;
        wire
    }

    /// Cuts the link, at the machine's end.
    pub(super) async fn cut(&self) {
        self.ip("link set eth0 down").await;
    }

    /// Returns the address of the next pod.
    pub(super) fn next(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, self.number, self.last.fetch_add(1, Ordering::Relaxed))
    }

    /// Wraps a command to run on the machine.
    pub(super) fn inside(&self, command: &Command) -> Command {
        let command = command.as_std();
        let mut inside = self.enter();
        inside.arg(command.get_program()).args(command.get_args()).process_group(0);
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        inside
    }

    async fn ip(&self, words: &str) {
        let mut command = self.enter();
        command.arg("ip").args(words.split(' '));
        run(command).await;
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.process())).arg("--");
        command
    }

    fn process(&self) -> u32 {
        self.holder.id().unwrap()
    }
}

async fn ip(words: &str) {
    let mut command = Command::new("ip");
    command.args(words.split(' '));
    run(command).await;
}

async fn run(mut command: Command) {
    let ended = command.output().await.unwrap();
    assert!(ended.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ended.stderr));
}
