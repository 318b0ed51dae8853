//! Conflicts between routes. Overlap is allowed, since the more specific route wins; equal claims are ambiguous.

use std::collections::HashMap;

use super::ConfigChecker;
use crate::{
    config::source::{KeyPath, SourceFile},
    domain::Claim,
};

impl ConfigChecker<'_> {
    pub(super) fn overlaps(&mut self) {
        let routes = &self.config.routes;
        let indices = self.source.map(SourceFile::route_indices).unwrap_or_default();
        let place = |index: usize| KeyPath::default().key("routes").index(indices[index]);
        let mut names = HashMap::new();
        let mut claimed: HashMap<Claim<'_>, usize> = HashMap::new();
        for (index, route) in routes.iter().enumerate() {
            if let Some(first) = names.insert(&route.name, index) {
                let message =
                    format!("\"{}\" is also the name of {}; a name is given once", route.name, place(first));
                self.error(&place(index).key("name"), message);
            }
            // Without its conditions the route would match everything.
            if self.is_faulty(&place(index).key("match")) {
                continue;
            }
            let mut both: Option<(usize, Claim<'_>)> = None;
            for claim in route.claims() {
                let first = *claimed.entry(claim.clone()).or_insert(index);
                if first < index && both.as_ref().is_none_or(|(other, _)| first < *other) {
                    both = Some((first, claim));
                }
            }
            let Some((first, both)) = both else { continue };
            let message = format!(
                "\"{}\" and \"{}\" ({}) both match {both}; let one route match what the other does not",
                route.name,
                routes[first].name,
                place(first)
            );
            self.error(&place(index).key("match"), message);
        }
    }
}
