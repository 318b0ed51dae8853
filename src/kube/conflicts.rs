//! Resolves conflicts among routes: a route is served with the matches that no preceding route claims.
//!
//! The configuration file precedes the cluster, and older objects precede younger ones. A younger route loses only the
//! shared matches, and is refused only if none remain; otherwise the owner of an older route could disable a younger
//! one by adding a single match. No verdict depends on a later object.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::report::Verdict;
use crate::domain::{Claim, Route, RouteKey, Target};

/// Kinds of route objects, in order of precedence for equal names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    /// Defined by Anteroom.
    ModelRoute,
    /// Defined by KEDA's HTTP Add-on.
    InterceptorRoute,
}

/// Reference to a route object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteObject {
    /// Kind.
    pub kind: RouteKind,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// A route object to be considered.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RouteCandidate {
    pub(super) object: RouteObject,
    /// Creation time in seconds since the Unix epoch.
    pub(super) created: Option<i64>,
    /// The parsed route with warnings, or the reason why it is invalid.
    pub(super) route: Result<(Arc<Route>, Vec<String>), String>,
}

/// Served routes in order of precedence, and a verdict per object.
pub(super) struct Resolution {
    pub(super) routes: Vec<Arc<Route>>,
    pub(super) verdicts: BTreeMap<RouteObject, Verdict>,
}

/// Upper bound of served cluster routes.
pub(super) const MAX_ROUTES: usize = 10_000;
/// Upper bound of combinations of host, path, headers and model over all cluster routes.
pub(super) const MAX_CLAIMS: usize = 200_000;

/// Owner of a name or match.
#[derive(Clone, Copy)]
enum MatchOwner<'a> {
    File(&'a RouteKey),
    Object(&'a RouteObject),
}

/// Resolves all candidates against each other and the routes of the configuration file.
pub(super) fn resolve_conflicts(file: &[Route], mut candidates: Vec<RouteCandidate>) -> Resolution {
    candidates.sort_by(|one, other| one.precedence().cmp(&other.precedence()));
    let mut names: HashMap<(&str, &str), MatchOwner<'_>> = HashMap::new();
    let of_ours = candidates.iter().map(|candidate| &candidate.object);
    for object in of_ours.filter(|object| object.kind == RouteKind::ModelRoute) {
        names.insert((&object.namespace, &object.name), MatchOwner::Object(object));
    }
    let mut claimed: HashMap<Claim<'_>, MatchOwner<'_>> = HashMap::new();
    for route in file {
        if let Some(name) = route.name.as_str().split_once('/') {
            names.insert(name, MatchOwner::File(&route.name));
        }
        claimed.extend(route.claims().map(|claim| (claim, MatchOwner::File(&route.name))));
    }

    let mut verdicts = BTreeMap::new();
    let mut served = vec![false; candidates.len()];
    let (mut routes, mut claims) = (0, 0_usize);
    for (candidate, served) in candidates.iter().zip(&mut served) {
        let object = &candidate.object;
        let verdict = match &candidate.route {
            Err(message) => Verdict::Invalid(message.clone()),
            Ok((route, remarks)) => {
                let owner = names.get(&(object.namespace.as_str(), object.name.as_str()));
                let count = claims.saturating_add(route.claim_count());
                if let Some(owner) = owner.filter(|owner| !owner.is(object)) {
                    Verdict::Conflict(format!("{owner} has this name already; give this route another one"))
                } else if routes == MAX_ROUTES || count > MAX_CLAIMS {
                    Verdict::Limit(format!(
                        "{MAX_ROUTES} routes with {MAX_CLAIMS} combinations of host, path, headers and model are \
                         the maximum, and older routes use them all; delete some"
                    ))
                } else {
                    let verdict = claim(object, route, remarks, &mut claimed);
                    if verdict.is_accepted() {
                        (*served, routes, claims) = (true, routes + 1, count);
                    }
                    verdict
                }
            }
        };
        verdicts.insert(object.clone(), verdict);
    }
    drop(claimed);
    let routes = candidates.into_iter().zip(served).filter(|(_, served)| *served);
    let routes = routes.filter_map(|(candidate, _)| Some(candidate.route.ok()?.0));
    Resolution { routes: routes.collect(), verdicts }
}

/// Claims the matches of a route that have no owner yet.
fn claim<'a>(
    object: &'a RouteObject,
    route: &'a Route,
    remarks: &[String],
    claimed: &mut HashMap<Claim<'a>, MatchOwner<'a>>,
) -> Verdict {
    let (mut all, mut lost) = (0_usize, 0_usize);
    let mut first = None;
    for claim in route.claims() {
        all += 1;
        match claimed.get(&claim) {
            Some(owner) if !owner.is(object) => {
                lost += 1;
                first.get_or_insert_with(|| format!("{owner} matches {claim} as well, and takes precedence"));
            }
            Some(_) => {}
            None => {
                claimed.insert(claim, MatchOwner::Object(object));
            }
        }
    }
    match first {
        Some(first) if lost == all => Verdict::Conflict(format!("{first}; nothing is left for this route")),
        _ => {
            let target = match &route.target {
                Target::Cluster(target) => target.to_string(),
                Target::Url(url) => url.clone(),
                Target::Process(_) => String::new(),
            };
            let partly = first.is_some();
            let conflict =
                first.map(|first| format!("but {lost} of its {all} matches belong to other routes: {first}"));
            Verdict::Accepted {
                target,
                remarks: conflict.into_iter().chain(remarks.iter().cloned()).collect(),
                partly,
            }
        }
    }
}

// === impl RouteCandidate ===

impl RouteCandidate {
    /// Returns the sort key, lowest first. Without a creation time an object sorts last.
    fn precedence(&self) -> (bool, Option<i64>, &RouteObject) {
        (self.created.is_none(), self.created, &self.object)
    }
}

// === impl MatchOwner ===

impl MatchOwner<'_> {
    fn is(&self, object: &RouteObject) -> bool {
        matches!(self, Self::Object(owner) if *owner == object)
    }
}

impl std::fmt::Display for MatchOwner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(name) => write!(f, "the route \"{name}\" of the proxy's configuration"),
            Self::Object(object) => object.fmt(f),
        }
    }
}

// === impl RouteKind ===

impl RouteKind {
    /// Returns the kind as used by Kubernetes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ModelRoute => "ModelRoute",
            Self::InterceptorRoute => "InterceptorRoute",
        }
    }
}

// === impl RouteObject ===

impl RouteObject {
    /// Returns the key of its route.
    pub fn key(&self) -> RouteKey {
        format!("{}/{}", self.namespace, self.name).as_str().into()
    }
}

impl std::fmt::Display for RouteObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}/{}", self.kind.name(), self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests;
