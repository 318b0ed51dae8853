//! Client of the admin APIs of all replicas.

use std::time::Duration;

use serde::{Deserialize, de::DeserializeOwned};

use crate::{bench::http::BaseUrl, coldstart::ColdStart};

/// Admin APIs of the replicas of a proxy, for one route.
#[derive(Clone, Debug)]
pub(super) struct AdminApis {
    pub(super) bases: Vec<BaseUrl>,
    pub(super) route: String,
}

/// State of the route on one replica.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct RouteSnapshot {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) reason: Option<String>,
    pub(super) obstacle: Option<ObstacleSnapshot>,
    pub(super) phase: Option<String>,
    pub(super) time_left_ms: Option<f64>,
    pub(super) held: u64,
    pub(super) in_flight: u64,
}

/// Obstacle to the start of the target.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct ObstacleSnapshot {
    pub(super) message: String,
}

#[derive(Deserialize)]
struct RoutesResponse {
    routes: Vec<RouteSnapshot>,
}

#[derive(Deserialize)]
struct ColdStartsResponse {
    cold_starts: Vec<ColdStart>,
}

/// Timeout of a request to an admin API.
const ADMIN_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Records requested per query; more than one cycle can produce.
const RECORDS_PER_QUERY: usize = 20;

// === impl AdminApis ===

impl AdminApis {
    /// Checks that every replica is reachable and has the route. `name` is optional if there is only one route.
    ///
    /// # Errors
    /// Names the address and the remedy.
    pub(super) async fn connect(bases: Vec<BaseUrl>, name: Option<&str>) -> Result<Self, String> {
        let mut found: Option<String> = None;
        for base in &bases {
            let routes = get::<RoutesResponse>(base, "/api/v1/routes").await.map_err(|error| {
                format!(
                    "cannot reach the admin API at {base}: {error}; set --admin to the address of the configuration key \
                     `admin` (port 8081 by default), in a cluster through `kubectl port-forward`"
                )
            })?;
            let names: Vec<_> = routes.routes.into_iter().map(|route| route.name).collect();
            let list = || names.join(", ");
            let wanted = match (name.or(found.as_deref()), names.as_slice()) {
                (_, []) => return Err(format!("the proxy at {base} has no route")),
                (None, [only]) => only.clone(),
                (None, _) => {
                    return Err(format!(
                        "the proxy at {base} has several routes; choose one with --route: {}",
                        list()
                    ));
                }
                (Some(name), _) if names.iter().any(|known| known == name) => name.to_owned(),
                (Some(name), _) => {
                    return Err(format!("the proxy at {base} has no route {name}; it has: {}", list()));
                }
            };
            found = Some(wanted);
        }
        found.map(|route| Self { bases, route }).ok_or_else(|| "--admin is missing".to_owned())
    }

    /// Returns the state of the route, preferably from a replica on which it is not at zero.
    ///
    /// # Errors
    /// If a replica is unreachable or no longer has the route.
    pub(super) async fn route(&self) -> Result<RouteSnapshot, String> {
        let mut at_zero = None;
        for base in &self.bases {
            let routes = get::<RoutesResponse>(base, "/api/v1/routes").await;
            let routes =
                routes.map_err(|error| format!("cannot reach the admin API at {base}: {error}"))?.routes;
            let route = routes.into_iter().find(|route| route.name == self.route);
            let route =
                route.ok_or_else(|| format!("the proxy at {base} no longer has the route {}", self.route))?;
            if !route.is_at_zero() {
                return Ok(route);
            }
            at_zero = Some(route);
        }
        at_zero.ok_or_else(|| "--admin is missing".to_owned())
    }

    /// Returns the most recent cold starts of all replicas.
    ///
    /// # Errors
    /// If a replica is unreachable or its response is invalid.
    pub(super) async fn records(&self) -> Result<Vec<ColdStart>, String> {
        let name = percent_encoding::utf8_percent_encode(&self.route, percent_encoding::NON_ALPHANUMERIC);
        let path = format!("/api/v1/cold-starts?route={name}&limit={RECORDS_PER_QUERY}");
        let mut records = Vec::new();
        for base in &self.bases {
            let got = get::<ColdStartsResponse>(base, &path).await;
            let got = got.map_err(|error| format!("cannot read the cold starts at {base}: {error}"))?;
            records.extend(got.cold_starts);
        }
        Ok(records)
    }
}

async fn get<T: DeserializeOwned>(base: &BaseUrl, path: &str) -> Result<T, String> {
    let (status, body) = base.get(path, ADMIN_REQUEST_TIMEOUT).await?;
    if !status.is_success() {
        return Err(format!("HTTP {status}; check that this is the admin address of Anteroom"));
    }
    serde_json::from_slice(&body)
        .map_err(|error| format!("invalid response: {error}; check that the proxy has the same version"))
}

// === impl RouteSnapshot ===

impl RouteSnapshot {
    /// Returns whether the target is stopped and no request is held or in flight.
    pub(super) fn is_at_zero(&self) -> bool {
        self.state == "idle" && self.held == 0 && self.in_flight == 0
    }

    /// Describes the state for progress and error messages.
    pub(super) fn description(&self) -> String {
        let mut text = self.state.clone();
        for (count, what) in [(self.held, "held"), (self.in_flight, "in flight")] {
            if count > 0 {
                text += &format!(", {count} {what}");
            }
        }
        if let Some(phase) = &self.phase {
            text += &format!(", in {phase}");
        }
        if let Some(left) = self.time_left_ms {
            text += &format!(", about {:.0} s left", left / 1e3);
        }
        if let Some(why) = self.reason.as_ref().or(self.obstacle.as_ref().map(|obstacle| &obstacle.message)) {
            text += &format!(": {why}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_route_without_requests_is_at_zero() {
        let route = |state: &str, held, in_flight| RouteSnapshot {
            state: state.to_owned(),
            held,
            in_flight,
            ..RouteSnapshot::default()
        };
        assert!(route("idle", 0, 0).is_at_zero());
        for other in [route("idle", 1, 0), route("idle", 0, 1), route("ready", 0, 0), route("stopping", 0, 0)]
        {
            assert!(!other.is_at_zero(), "{other:?}");
        }
        let loading = RouteSnapshot {
            phase: Some("load".into()),
            time_left_ms: Some(12_300.0),
            obstacle: Some(ObstacleSnapshot { message: "no node".into() }),
            ..route("starting", 3, 0)
        };
        assert_eq!(loading.description(), "starting, 3 held, in load, about 12 s left: no node");
    }
}
