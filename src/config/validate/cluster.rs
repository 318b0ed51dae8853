//! Validation of the scaler, other replicas and the cluster.

use super::{ConfigChecker, allowed, route::host_name};
use crate::{
    config::source::KeyPath,
    domain::{FailureGrace, Route, ScaleBy, Scaling, Workload},
};

impl ConfigChecker<'_> {
    pub(super) fn cluster(&mut self) {
        let root = KeyPath::default();
        let config = self.config;
        if let Some(tls) = &config.scaler_tls {
            let path = root.key("scalerTls");
            if config.scaler.is_none() {
                let message = "there is no scaler to secure; give its address with `scaler`";
                self.misfit(&path, &root.key("scaler"), message);
            }
            let files =
                [("cert", Some(&tls.cert)), ("key", Some(&tls.key)), ("clientCa", tls.client_ca.as_ref())];
            for (key, file) in files {
                self.shell_reference(&path.key(key));
                if file.is_some_and(String::is_empty) {
                    self.error(&path.key(key), "names no file");
                }
            }
        }
        if let Some(peers) = &config.peers {
            let path = root.key("peers");
            let port = peers.service.rsplit_once(':').filter(|(host, _)| !host.is_empty());
            if port.and_then(|(_, port)| port.parse::<u16>().ok()).is_none_or(|port| port == 0) {
                let message = format!(
                    "\"{}\" is not name:port, such as anteroom-peers:{}",
                    peers.service,
                    peers.listen.port()
                );
                self.error(&path.key("service"), message);
            }
            self.shell_reference(&path.key("tokenFile"));
            self.period(&path.key("timeout"), peers.timeout);
            self.at_most_a_month(&path.key("unreachableTimeout"), peers.unreachable_timeout);
            if peers.unreachable_timeout < peers.timeout {
                let message = format!(
                    "{} is less than `timeout`, {}, for which every silent replica counts",
                    peers.unreachable_timeout, peers.timeout
                );
                self.misfit(&path.key("unreachableTimeout"), &path.key("timeout"), message);
            }
        }
        if let Some(kubernetes) = &config.kubernetes {
            let path = root.key("kubernetes");
            for (index, namespace) in kubernetes.namespaces.iter().enumerate() {
                let fits = |character: char| matches!(character, 'a'..='z' | '0'..='9' | '-');
                if namespace.is_empty() || namespace.len() > 63 || !namespace.chars().all(fits) {
                    let message = format!("\"{namespace}\" is not the name of a namespace");
                    self.error(&path.key("namespaces").index(index), message);
                }
            }
            for (index, host) in kubernetes.allowed_hosts.iter().enumerate() {
                if let Err(message) = host_name(allowed::split(host).0) {
                    self.error(&path.key("allowedHosts").index(index), format!("\"{host}\" {message}"));
                }
            }
        }
    }

    /// Validates the scaling settings of a route.
    pub(super) fn scaling(&mut self, route: &Route, path: &KeyPath) {
        let Scaling { target, activation_replicas, linger, request_rate, idle_timeout, .. } = route.scaling;
        let scaling = path.key("scaling");
        self.positive(&scaling.key("target"), target as usize);
        self.positive(&scaling.key("activationReplicas"), activation_replicas as usize);
        self.at_most_a_month(&scaling.key("linger"), linger);
        self.at_most_a_month(&scaling.key("idleTimeout"), idle_timeout);
        if let Some(rate) = request_rate {
            self.positive(&scaling.key("requestRate").key("target"), rate.target as usize);
            self.period(&scaling.key("requestRate").key("window"), rate.window);
        }
        if route.scale_by == ScaleBy::Kubernetes {
            if !self.is_in_cluster() {
                let message = "is for routes of the cluster, which have a namespace; write a ModelRoute";
                self.error(&path.key("scaleBy"), message);
            } else if route.workload.is_none() {
                let message =
                    "is kubernetes, and nothing says what to scale; add `workload` with its kind and name";
                self.error(&path.key("scaleBy"), message);
            }
        }
        if let Some(workload) = &route.workload {
            let path = path.key("workload");
            let Workload { name, kind, api_version } = workload;
            for (key, value) in [("name", name), ("kind", kind), ("apiVersion", api_version)] {
                if value.is_empty() {
                    self.error(&path.key(key), "is empty");
                } else if workload.invalid_key() == Some(key) {
                    let message = format!("\"{value}\" is invalid; write it as in apps/v1, Deployment, vllm");
                    self.error(&path.key(key), message);
                }
            }
        }
        let FailureGrace { image_pull, crash_loop, unschedulable, quota, out_of_memory, volume, service } =
            route.failure_grace;
        let path = path.key("failureGrace");
        for (key, period) in [
            ("imagePull", image_pull),
            ("crashLoop", crash_loop),
            ("unschedulable", unschedulable),
            ("quota", quota),
            ("outOfMemory", out_of_memory),
            ("volume", volume),
            ("service", service),
        ] {
            self.at_most_a_month(&path.key(key), period);
        }
    }
}
