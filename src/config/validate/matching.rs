//! Routes against each other. Overlap is no error as such, the more specific route goes first; only what is equally
//! specific leaves open which one is meant.

use std::collections::{BTreeMap, HashMap};

use super::Checker;
use crate::{config::source::KeyPath, domain::Matcher};

impl Checker<'_> {
    pub(super) fn overlaps(&mut self) {
        let routes = &self.config.routes;
        let place = |index: usize| KeyPath::default().key("routes").index(index);
        let mut names = HashMap::new();
        for (index, route) in routes.iter().enumerate() {
            if let Some(first) = names.insert(&route.name, index) {
                let message =
                    format!("\"{}\" is also the name of {}; a name is given once", route.name, place(first));
                self.error(&place(index).key("name"), message);
            }
        }
        // Each with all: routes are few, and this runs once per load.
        let combinations = routes.iter().map(|route| Combinations::of(&route.matcher)).collect::<Vec<_>>();
        for (index, one) in combinations.iter().enumerate() {
            let Some((first, both)) = combinations[..index]
                .iter()
                .enumerate()
                .find_map(|(first, other)| Some((first, one.in_common(other)?)))
            else {
                continue;
            };
            let message = format!(
                "\"{}\" and \"{}\" ({}) both match {both}; let one route match what the other does not",
                routes[index].name,
                routes[first].name,
                place(first)
            );
            self.error(&place(index).key("match"), message);
        }
    }
}

/// What a route matches, in one spelling. A kind that is left out is the one choice `None`: anything.
struct Combinations<'a> {
    hosts: Vec<Option<String>>,
    paths: Vec<Option<&'a str>>,
    headers: BTreeMap<String, &'a str>,
    models: Vec<Option<&'a str>>,
}

impl<'a> Combinations<'a> {
    fn of(matcher: &'a Matcher) -> Self {
        let headers = matcher.headers.iter();
        Self {
            hosts: choices(&matcher.hosts, |host| Some(host.to_ascii_lowercase())),
            // `/a/` is `/a`, and `/` is every path.
            paths: choices(&matcher.paths, |path| {
                Some(path.trim_end_matches('/')).filter(|path| !path.is_empty())
            }),
            headers: headers.map(|(name, value)| (name.to_ascii_lowercase(), value.as_str())).collect(),
            models: choices(&matcher.models, Some),
        }
    }

    /// A request that both match equally well, in words.
    fn in_common(&self, other: &Self) -> Option<String> {
        let host = shared(&self.hosts, &other.hosts)?;
        let path = shared(&self.paths, &other.paths)?;
        let model = shared(&self.models, &other.models)?;
        if self.headers != other.headers {
            return None;
        }
        let mut words = Vec::new();
        words.extend(model.map(|model| format!("model \"{model}\"")));
        words.extend(host.as_deref().map(|host| format!("host \"{host}\"")));
        words.extend(path.map(|path| format!("path \"{path}\"")));
        if !self.headers.is_empty() {
            words.push("the same headers".to_owned());
        }
        Some(if words.is_empty() { "every request".to_owned() } else { words.join(", ") })
    }
}

fn choices<'a, T>(texts: &'a [String], choice: impl Fn(&'a str) -> Option<T>) -> Vec<Option<T>> {
    if texts.is_empty() { vec![None] } else { texts.iter().map(|text| choice(text)).collect() }
}

fn shared<T: Clone + PartialEq>(one: &[T], other: &[T]) -> Option<T> {
    one.iter().find(|choice| other.contains(choice)).cloned()
}
