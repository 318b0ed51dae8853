//! Anteroom in the cluster: the replicas of a scenario, each a process with the rights granted by the chart.

use std::{net::Ipv4Addr, net::SocketAddr};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::{
    chart,
    client::{self, StreamingResponse},
    in_cluster::ServiceAccountFolder,
    model,
    plane::{self, daemon::Daemon},
    relay::TcpRelay,
    scenario::Scenario,
    wait, world,
};

/// Replicas of a scenario's Anteroom. Dropping them kills them.
pub(crate) struct Anteroom {
    pub(crate) replicas: Vec<AnteroomReplica>,
    it: Scenario,
}

/// One replica, at its own address.
pub(crate) struct AnteroomReplica {
    pub(crate) address: Ipv4Addr,
    daemon: Daemon,
}

// === impl Scenario ===

impl Scenario {
    /// Starts replicas at the scenario's addresses 1, 2 and so on, and waits until they are ready. `config` is merged
    /// into the common configuration: the ports of the chart, peers, and the namespace to watch.
    pub(crate) async fn anteroom(&self, replicas: u8, config: Value) -> Anteroom {
        self.anteroom_with(replicas, config, &[]).await
    }

    /// Same as [`Self::anteroom`], with the rights that the chart grants with these values.
    pub(crate) async fn anteroom_with(&self, replicas: u8, config: Value, values: &[&str]) -> Anteroom {
        self.anteroom_at(plane::ADDRESS, replicas, config, values).await
    }

    /// Starts one replica that reaches the apiserver through a relay.
    pub(crate) async fn anteroom_behind_relay(&self) -> (Anteroom, TcpRelay) {
        let relay = TcpRelay::start(self.socket(40, plane::PORT)).await;
        let name = format!("{}.relay.test", self.namespace);
        self.world.dns.set(&name, &[self.address(40)]);
        (self.anteroom_at(&name, 1, json!({}), &[]).await, relay)
    }

    async fn anteroom_at(&self, apiserver: &str, replicas: u8, config: Value, values: &[&str]) -> Anteroom {
        for object in chart::rights(&self.world, &self.namespace, values).await {
            self.apply(&object).await;
        }
        let plane = &self.world.plane;
        let account = ServiceAccountFolder::new(
            &self.kube,
            &plane.folders.run,
            &plane.authority.pem,
            &self.namespace,
            "anteroom",
        )
        .await;
        let replicas = (1..=replicas)
            .map(|number| AnteroomReplica::new(self, number, &config, account.clone(), apiserver.to_owned()));
        let mut anteroom = Anteroom { replicas: replicas.collect(), it: self.clone() };
        anteroom.publish();
        anteroom.replicas.iter_mut().for_each(|replica| replica.daemon.start());
        for replica in &mut anteroom.replicas {
            replica.ready().await;
        }
        anteroom
    }
}

// === impl Anteroom ===

impl Anteroom {
    /// Returns the scaler address for a ScaledObject: it resolves to all replicas, like a headless Service.
    pub(crate) fn scaler(&self) -> String {
        format!("{}:9090", self.name("anteroom-scaler"))
    }

    fn name(&self, service: &str) -> String {
        service_name(&self.it, service)
    }

    /// Updates the DNS names of the Services to the running replicas.
    fn publish(&self) {
        let addresses: Vec<_> = self.replicas.iter().map(|replica| replica.address).collect();
        for service in ["anteroom-peers", "anteroom-scaler"] {
            self.it.world.dns.set(&self.name(service), &addresses);
        }
    }

    /// Kills a replica with SIGKILL and removes it from DNS.
    pub(crate) async fn kill(&mut self, index: usize) {
        let mut replica = self.replicas.remove(index);
        replica.daemon.kill().await;
        self.publish();
    }
}

// === impl AnteroomReplica ===

impl AnteroomReplica {
    fn new(
        it: &Scenario,
        number: u8,
        more: &Value,
        account: ServiceAccountFolder,
        apiserver: String,
    ) -> Self {
        let address = it.address(number);
        let mut config = json!({
            "listen": format!("{address}:8080"),
            "admin": format!("{address}:8081"),
            "scaler": format!("{address}:9090"),
            "peers": {
                "listen": format!("{address}:9091"),
                "service": format!("{}:9091", service_name(it, "anteroom-peers")),
            },
            "kubernetes": { "namespaces": [it.namespace] },
            "drainDelay": "0s",
        });
        model::merge(&mut config, more);
        let name = format!("{}.anteroom-{number}", it.namespace);
        let folders = &it.world.plane.folders;
        let file = folders.run.join(format!("{name}.yaml"));
        // JSON is valid YAML.
        std::fs::write(&file, serde_json::to_string_pretty(&config).unwrap()).unwrap();
        let daemon = Daemon::new(&name.clone(), &folders.logs, move || {
            let mut command = account.command(&world::anteroom());
            command.args(["serve", "--config"]).arg(&file).env("HOSTNAME", &name).env("NO_COLOR", "1");
            command.env("KUBERNETES_SERVICE_HOST", &apiserver);
            command
        });
        Self { address, daemon }
    }

    async fn ready(&mut self) {
        let admin = self.admin();
        self.daemon
            .ready(async || match client::get(admin, "/readyz").await?.status.as_u16() {
                200 => Ok(()),
                status => Err(format!("/readyz answers {status}")),
            })
            .await;
    }

    pub(crate) fn proxy(&self) -> SocketAddr {
        (self.address, 8080).into()
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        (self.address, 8081).into()
    }

    /// Requests a completion from a model, and waits for the head of the response.
    pub(crate) async fn ask(&self, model: &str, stream: bool) -> Result<StreamingResponse, String> {
        client::send(self.proxy(), client::completion("models.test", model, stream)).await
    }

    /// Returns the response of the admin API.
    pub(crate) async fn api(&self, path: &str) -> Value {
        client::get(self.admin(), path).await.unwrap().json().await
    }

    /// Returns the sum of the samples whose lines begin with `series`, such as `anteroom_held{route="a"`; `None` if
    /// there are none.
    pub(crate) async fn metric(&self, series: &str) -> Option<f64> {
        let text = client::get(self.admin(), "/metrics").await.unwrap().text().await.unwrap();
        let samples = text.lines().filter(|line| line.starts_with(series));
        let values = samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
    }

    /// Stops the replica with SIGTERM, like the kubelet, and waits until it has exited.
    pub(crate) async fn stop(&mut self) {
        let id = self.daemon.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw).unwrap();
        kill_process(id, Signal::TERM).unwrap();
        wait::within("the end of a replica", wait::WAIT_LIMIT, self.daemon.end()).await;
    }

    /// Starts the replica again.
    pub(crate) async fn start(&mut self) {
        self.daemon.start();
        self.ready().await;
    }

    /// Kills the replica; it can be started again at the same address.
    pub(crate) async fn crash(&mut self) {
        self.daemon.kill().await;
    }
}

fn service_name(it: &Scenario, service: &str) -> String {
    format!("{service}.{}.svc.cluster.local", it.namespace)
}
