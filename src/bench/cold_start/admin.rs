//! What the proxies' admin APIs say of the route.

use std::time::Duration;

use serde::{Deserialize, de::DeserializeOwned};

use crate::{bench::http::Base, coldstart::ColdStart};

/// The admin listeners of all replicas that we know.
#[derive(Clone, Debug)]
pub(super) struct Admins {
    pub(super) bases: Vec<Base>,
    pub(super) route: String,
}

/// A route as one replica sees it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct RouteNow {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) reason: Option<String>,
    pub(super) obstacle: Option<ObstacleNow>,
    pub(super) phase: Option<String>,
    pub(super) time_left_ms: Option<f64>,
    pub(super) held: u64,
    pub(super) in_flight: u64,
}

/// What stands in its way.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct ObstacleNow {
    pub(super) message: String,
}

#[derive(Deserialize)]
struct Routes {
    routes: Vec<RouteNow>,
}

#[derive(Deserialize)]
struct ColdStarts {
    cold_starts: Vec<ColdStart>,
}

/// How long an admin API may take.
const LIMIT: Duration = Duration::from_secs(10);

/// How many records are asked for: those that may have come since the last look.
const RECENT: usize = 20;

// === impl Admins ===

impl Admins {
    /// Looks whether all of them answer and know the route. Without a name it is the only one that they have.
    ///
    /// # Errors
    /// A sentence with the way out.
    pub(super) async fn find(bases: Vec<Base>, name: Option<&str>) -> Result<Self, String> {
        let mut found: Option<String> = None;
        for base in &bases {
            let routes = get::<Routes>(base, "/api/v1/routes").await.map_err(|error| {
                format!(
                    "the admin API at {base} cannot be asked: {error}; --admin takes the address of the key `admin` \
                     (8081 by default), for a cluster through `kubectl port-forward`"
                )
            })?;
            let names: Vec<_> = routes.routes.into_iter().map(|route| route.name).collect();
            let list = || names.join(", ");
            let wanted = match (name.or(found.as_deref()), names.as_slice()) {
                (_, []) => return Err(format!("the proxy at {base} has no route")),
                (None, [only]) => only.clone(),
                (None, _) => {
                    return Err(format!(
                        "the proxy at {base} has several routes: say which with --route: {}",
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
        found.map(|route| Self { bases, route }).ok_or_else(|| "there is no --admin to ask".to_owned())
    }

    /// The route as it is now: of several replicas, as that sees it for which it is not at zero.
    ///
    /// # Errors
    /// When one cannot be asked.
    pub(super) async fn route(&self) -> Result<RouteNow, String> {
        let mut seen = None;
        for base in &self.bases {
            let routes = get::<Routes>(base, "/api/v1/routes").await;
            let routes =
                routes.map_err(|error| format!("the admin API at {base} cannot be asked: {error}"))?.routes;
            let route = routes.into_iter().find(|route| route.name == self.route);
            let route =
                route.ok_or_else(|| format!("the proxy at {base} has no route {} any more", self.route))?;
            if !route.is_at_zero() {
                return Ok(route);
            }
            seen = Some(route);
        }
        seen.ok_or_else(|| "there is no admin API to ask".to_owned())
    }

    /// The records that ended lately, of every replica.
    ///
    /// # Errors
    /// When one cannot be asked, or says something else.
    pub(super) async fn records(&self) -> Result<Vec<ColdStart>, String> {
        let name = percent_encoding::utf8_percent_encode(&self.route, percent_encoding::NON_ALPHANUMERIC);
        let path = format!("/api/v1/cold-starts?route={name}&limit={RECENT}");
        let mut records = Vec::new();
        for base in &self.bases {
            let got = get::<ColdStarts>(base, &path).await;
            let got = got.map_err(|error| format!("the records at {base} cannot be had: {error}"))?;
            records.extend(got.cold_starts);
        }
        Ok(records)
    }
}

async fn get<T: DeserializeOwned>(base: &Base, path: &str) -> Result<T, String> {
    let (status, body) = base.get(path, LIMIT).await?;
    if !status.is_success() {
        return Err(format!("it answers {status}; is it the admin address of an Anteroom?"));
    }
    serde_json::from_slice(&body)
        .map_err(|error| format!("its answer is not what Anteroom says: {error}; is it another version?"))
}

// === impl RouteNow ===

impl RouteNow {
    /// Whether nothing runs, and nobody waits for it to.
    pub(super) fn is_at_zero(&self) -> bool {
        self.state == "idle" && self.held == 0 && self.in_flight == 0
    }

    /// In a few words.
    pub(super) fn words(&self) -> String {
        let mut words = self.state.clone();
        for (count, what) in [(self.held, "held"), (self.in_flight, "in flight")] {
            if count > 0 {
                words += &format!(", {count} {what}");
            }
        }
        if let Some(phase) = &self.phase {
            words += &format!(", in {phase}");
        }
        if let Some(left) = self.time_left_ms {
            words += &format!(", about {:.0} s left", left / 1e3);
        }
        if let Some(why) = self.reason.as_ref().or(self.obstacle.as_ref().map(|obstacle| &obstacle.message)) {
            words += &format!(": {why}");
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_idle_with_nobody_waiting() {
        let route = |state: &str, held, in_flight| RouteNow {
            state: state.to_owned(),
            held,
            in_flight,
            ..RouteNow::default()
        };
        assert!(route("idle", 0, 0).is_at_zero());
        for other in [route("idle", 1, 0), route("idle", 0, 1), route("ready", 0, 0), route("stopping", 0, 0)]
        {
            assert!(!other.is_at_zero(), "{other:?}");
        }
        let loading = RouteNow {
            phase: Some("load".into()),
            time_left_ms: Some(12_300.0),
            obstacle: Some(ObstacleNow { message: "no node".into() }),
            ..route("starting", 3, 0)
        };
        assert_eq!(loading.words(), "starting, 3 held, in load, about 12 s left: no node");
    }
}
