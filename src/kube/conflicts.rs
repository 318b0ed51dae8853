//! Which routes of the cluster are served: the valid ones, each with what no route before it matches.
//!
//! The file goes before the cluster, the older object before the younger. A younger route loses exactly the matches that
//! it shares, and is refused only if nothing is left: else whoever has the older route could put a younger one out of
//! service by adding one match to their own. No verdict depends on an object that goes later.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::report::Verdict;
use crate::domain::{Claim, Route, RouteKey, Target};

/// The kinds of objects that are routes. If two have one name, the first kind has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    /// Ours.
    ModelRoute,
    /// Of KEDA's HTTP Add-on.
    InterceptorRoute,
}

/// An object that is a route.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteObject {
    /// Its kind.
    pub kind: RouteKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// An object that might be served.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) object: RouteObject,
    /// When it was made, in seconds of the epoch.
    pub(super) created: Option<i64>,
    /// What it says, with remarks; or what is wrong with it.
    pub(super) route: Result<(Arc<Route>, Vec<String>), String>,
}

/// What is served, in the order of precedence, and what is to be said of each object.
pub(super) struct Settled {
    pub(super) routes: Vec<Arc<Route>>,
    pub(super) verdicts: BTreeMap<RouteObject, Verdict>,
}

/// How many routes of the cluster are served.
pub(super) const MOST_ROUTES: usize = 10_000;
/// How many combinations of host, path, headers and model they may make in all.
pub(super) const MOST_CLAIMS: usize = 200_000;

/// Who a match belongs to.
#[derive(Clone, Copy)]
enum Owner<'a> {
    File(&'a RouteKey),
    Object(&'a RouteObject),
}

/// Decides between all candidates. `file` has the routes of the file.
pub(super) fn settle(file: &[Route], mut candidates: Vec<Candidate>) -> Settled {
    candidates.sort_by(|one, other| one.precedence().cmp(&other.precedence()));
    let mut names: HashMap<(&str, &str), Owner<'_>> = HashMap::new();
    let of_ours = candidates.iter().map(|candidate| &candidate.object);
    for object in of_ours.filter(|object| object.kind == RouteKind::ModelRoute) {
        names.insert((&object.namespace, &object.name), Owner::Object(object));
    }
    let mut claimed: HashMap<Claim<'_>, Owner<'_>> = HashMap::new();
    for route in file {
        if let Some(name) = route.name.as_str().split_once('/') {
            names.insert(name, Owner::File(&route.name));
        }
        claimed.extend(route.claims().map(|claim| (claim, Owner::File(&route.name))));
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
                } else if routes == MOST_ROUTES || count > MOST_CLAIMS {
                    Verdict::Limit(format!(
                        "{MOST_ROUTES} routes with {MOST_CLAIMS} combinations of host, path, headers and model are \
                         the most, and older ones have used them up; delete some"
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
    Settled { routes: routes.collect(), verdicts }
}

/// Gives a route what nobody has yet.
fn claim<'a>(
    object: &'a RouteObject,
    route: &'a Route,
    remarks: &[String],
    claimed: &mut HashMap<Claim<'a>, Owner<'a>>,
) -> Verdict {
    let (mut all, mut lost) = (0_usize, 0_usize);
    let mut first = None;
    for claim in route.claims() {
        all += 1;
        match claimed.get(&claim) {
            Some(owner) if !owner.is(object) => {
                lost += 1;
                first.get_or_insert_with(|| format!("{owner} matches {claim} as well, and goes first"));
            }
            Some(_) => {}
            None => {
                claimed.insert(claim, Owner::Object(object));
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
                first.map(|first| format!("but {lost} of its {all} matches are another's: {first}"));
            Verdict::Accepted {
                target,
                remarks: conflict.into_iter().chain(remarks.iter().cloned()).collect(),
                partly,
            }
        }
    }
}

// === impl Candidate ===

impl Candidate {
    /// The least goes first. What has no age is as young as can be.
    fn precedence(&self) -> (bool, Option<i64>, &RouteObject) {
        (self.created.is_none(), self.created, &self.object)
    }
}

// === impl Owner ===

impl Owner<'_> {
    fn is(&self, object: &RouteObject) -> bool {
        matches!(self, Self::Object(owner) if *owner == object)
    }
}

impl std::fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(name) => write!(f, "the route \"{name}\" of the proxy's configuration"),
            Self::Object(object) => object.fmt(f),
        }
    }
}

// === impl RouteKind ===

impl RouteKind {
    /// Its name in the cluster.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ModelRoute => "ModelRoute",
            Self::InterceptorRoute => "InterceptorRoute",
        }
    }
}

// === impl RouteObject ===

impl RouteObject {
    /// The key of its route.
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
