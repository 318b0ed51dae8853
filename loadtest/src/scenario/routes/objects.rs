//! Objects of a cluster with many routes, as the API server returns them: for each route a ModelRoute, a Service, an
//! EndpointSlice and a ScaledObject.

use std::collections::VecDeque;
use std::fmt::Write as _;

/// Number of namespaces the routes are spread over.
pub(super) const NAMESPACES: usize = 20;
/// Number of routes that get requests; their endpoints do not change.
pub(super) const WARM_ROUTES: usize = 64;
/// Changes per second: half of them to a policy, half to endpoints.
pub(super) const CHANGES_PER_SEC: u32 = 1000;

/// Kinds of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ObjectKind {
    Route,
    Service,
    Slice,
    Scaled,
}

/// All objects. Each kind has one object per route, with the route's number.
#[derive(Debug)]
pub(super) struct Objects {
    /// Resource version of the last change.
    version: u64,
    /// Port of the endpoints of warm routes.
    backend: u16,
    routes: Vec<StoredRoute>,
    slices: Vec<Slice>,
    /// Changes not sent to watches yet.
    changed: VecDeque<(ObjectKind, usize)>,
}

#[derive(Debug)]
struct StoredRoute {
    version: u64,
    generation: u64,
    /// `maxRequests`, the setting changed by [`Objects::change_policy`].
    most_held: u32,
    /// Second model name, an addition to the route's match.
    alias: Option<String>,
    /// Last status written, as JSON.
    status: String,
}

#[derive(Debug)]
struct Slice {
    version: u64,
    /// Number of the current pod, which determines its address.
    pod: Option<u64>,
    /// True if the pod is the backend.
    is_backend: bool,
}

// === impl Objects ===

impl Objects {
    /// Creates the objects. Half of the routes have a pod, and so do all warm ones.
    pub(super) fn new(routes: usize, backend: u16) -> Self {
        let route =
            |_| StoredRoute { version: 1, generation: 1, most_held: 100, alias: None, status: "{}".into() };
        let slice = |number| Slice {
            version: 1,
            pod: (number < WARM_ROUTES || number % 2 == 0).then_some(0),
            is_backend: number < WARM_ROUTES,
        };
        Self {
            version: 1,
            backend,
            routes: (0..routes).map(route).collect(),
            slices: (0..routes).map(slice).collect(),
            changed: VecDeque::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.routes.len()
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Takes the changes since the last call.
    pub(super) fn changes(&mut self) -> VecDeque<(ObjectKind, usize)> {
        std::mem::take(&mut self.changed)
    }

    fn change(&mut self, kind: ObjectKind, number: usize) -> u64 {
        self.version += 1;
        self.changed.push_back((kind, number));
        self.version
    }

    /// Changes the policy of a route.
    pub(super) fn change_policy(&mut self, number: usize) {
        let version = self.change(ObjectKind::Route, number);
        let route = &mut self.routes[number];
        (route.version, route.generation) = (version, route.generation + 1);
        route.most_held = 100 + (route.most_held + 1) % 100;
    }

    /// Adds a model to a route.
    pub(super) fn set_alias(&mut self, number: usize, alias: String) {
        let version = self.change(ObjectKind::Route, number);
        let route = &mut self.routes[number];
        (route.version, route.generation) = (version, route.generation + 1);
        route.alias = Some(alias);
    }

    /// Removes the pod of a route, or adds one at an address not used before.
    pub(super) fn change_endpoints(&mut self, number: usize) {
        let version = self.change(ObjectKind::Slice, number);
        let slice = &mut self.slices[number];
        slice.version = version;
        slice.pod = if slice.pod.is_some() { None } else { Some(version) };
    }

    /// Adds a pod to a route, at the backend's address.
    pub(super) fn point_to_backend(&mut self, number: usize) {
        let version = self.change(ObjectKind::Slice, number);
        self.slices[number] = Slice { version, pod: Some(version), is_backend: true };
    }

    /// Stores a status written by a client.
    pub(super) fn set_status(&mut self, number: usize, status: String) {
        let version = self.change(ObjectKind::Route, number);
        let route = &mut self.routes[number];
        (route.version, route.status) = (version, status);
    }

    /// Returns the number of the object with this name in this namespace.
    pub(super) fn find(&self, namespace: &str, name: &str) -> Option<usize> {
        let number = name.strip_prefix('r').or_else(|| name.strip_prefix('s'))?;
        let number = number.strip_suffix("-x").unwrap_or(number).parse().ok()?;
        (number < self.len() && self::namespace(number) == namespace).then_some(number)
    }

    /// Writes an object as JSON.
    pub(super) fn write(&self, text: &mut String, kind: ObjectKind, number: usize) {
        let namespace = namespace(number);
        let _ = match kind {
            ObjectKind::Route => {
                let StoredRoute { version, generation, most_held, alias, status } = &self.routes[number];
                let alias = alias.as_ref().map(|alias| format!(r#","{alias}""#)).unwrap_or_default();
                write!(
                    text,
                    r#"{{"apiVersion":"anteroom.dev/v1alpha1","kind":"ModelRoute","metadata":{{"name":"r{number}","namespace":"{namespace}","uid":"r{number}","resourceVersion":"{version}","generation":{generation},"creationTimestamp":"2026-01-01T00:00:00Z"}},"spec":{{"match":{{"models":["m{number}"{alias}]}},"target":{{"service":{{"name":"s{number}","port":80}}}},"hold":{{"maxRequests":{most_held}}},"concurrency":{{"max":4096,"rampStart":4096}}}},"status":{status}}}"#
                )
            }
            ObjectKind::Service => write!(
                text,
                r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"s{number}","namespace":"{namespace}","uid":"s{number}","resourceVersion":"1","creationTimestamp":"2026-01-01T00:00:00Z"}},"spec":{{"ports":[{{"port":80}}],"ipFamilies":["IPv4"]}}}}"#
            ),
            // KEDA polls occasionally, without a stream. The workload is omitted, as Anteroom would watch it, too.
            ObjectKind::Scaled => write!(
                text,
                r#"{{"apiVersion":"keda.sh/v1alpha1","kind":"ScaledObject","metadata":{{"name":"r{number}","namespace":"{namespace}","uid":"so{number}","resourceVersion":"1","creationTimestamp":"2026-01-01T00:00:00Z"}},"spec":{{"scaleTargetRef":{{}},"triggers":[{{"type":"external","metadata":{{"scalerAddress":"anteroom:9090","route":"r{number}"}}}}]}}}}"#
            ),
            ObjectKind::Slice => {
                let version = self.slices[number].version;
                let (endpoints, port) = self.endpoints(number);
                write!(
                    text,
                    r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s{number}-x","namespace":"{namespace}","uid":"s{number}-x","resourceVersion":"{version}","creationTimestamp":"2026-01-01T00:00:00Z","labels":{{"kubernetes.io/service-name":"s{number}"}}}},"addressType":"IPv4","ports":[{{"port":{port},"protocol":"TCP"}}],"endpoints":[{endpoints}]}}"#
                )
            }
        };
    }

    fn endpoints(&self, number: usize) -> (String, u16) {
        let Slice { pod, is_backend: here, .. } = self.slices[number];
        let Some(pod) = pod else { return (String::new(), 8000) };
        let (address, port) = if here {
            ("127.0.0.1".into(), self.backend)
        } else {
            // No listener there, and packets to this address never leave the machine.
            (format!("127.{}.{}.{}", 1 + number / 250 % 250, 1 + number % 250, 1 + pod % 250), 8000)
        };
        let conditions = r#"{"ready":true,"serving":true,"terminating":false}"#;
        (format!(r#"{{"addresses":["{address}"],"conditions":{conditions}}}"#), port)
    }
}

/// Returns the namespace of the objects with this number.
pub(super) fn namespace(number: usize) -> String {
    format!("team-{}", number % NAMESPACES)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn read(objects: &Objects, kind: ObjectKind, number: usize) -> Value {
        let mut text = String::new();
        objects.write(&mut text, kind, number);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn change_is_stored_and_sent_once() {
        let mut objects = Objects::new(200, 4000);
        let before = read(&objects, ObjectKind::Route, 3);
        objects.change_policy(3);
        objects.set_alias(3, "other".into());
        objects.change_endpoints(100);
        objects.set_status(3, r#"{"held":7}"#.into());
        let after = read(&objects, ObjectKind::Route, 3);
        assert_ne!(before["spec"]["hold"], after["spec"]["hold"]);
        assert_eq!(after["spec"]["match"]["models"], serde_json::json!(["m3", "other"]));
        assert_eq!((&after["metadata"]["generation"], &after["status"]["held"]), (&3.into(), &7.into()));
        assert_eq!(after["metadata"]["resourceVersion"], objects.version().to_string());
        assert_eq!(
            read(&objects, ObjectKind::Slice, 100)["endpoints"],
            serde_json::json!([]),
            "its pod is gone"
        );
        assert_eq!(objects.changes().len(), 4);
        assert!(objects.changes().is_empty());
    }

    #[test]
    fn only_warm_routes_have_the_backend() {
        let objects = Objects::new(200, 4000);
        let warm = read(&objects, ObjectKind::Slice, 1);
        assert_eq!(
            (&warm["endpoints"][0]["addresses"][0], &warm["ports"][0]["port"]),
            (&"127.0.0.1".into(), &4000.into())
        );
        let other = read(&objects, ObjectKind::Slice, 100);
        assert!(other["endpoints"][0]["addresses"][0].as_str().unwrap().starts_with("127.1."));
        assert_eq!(read(&objects, ObjectKind::Service, 9)["metadata"]["name"], "s9");
        assert_eq!(objects.find("team-9", "s9"), Some(9));
        assert_eq!(objects.find("team-9", "s9-x"), Some(9));
        assert_eq!(objects.find("team-8", "r9"), None);
    }
}
