//! Claims of a route: two routes conflict if they make an equal claim.

use std::{borrow::Cow, fmt};

use super::{Matcher, Route};

/// One combination of a matcher's conditions, normalized. For equal claims of two routes it is undefined which one a
/// request belongs to; otherwise the more specific claim wins.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Claim<'a> {
    /// Lower case; `None` matches any host.
    host: Option<Cow<'a, str>>,
    /// Without a trailing slash; `None` matches any path.
    path: Option<&'a str>,
    /// `None` matches any model.
    model: Option<&'a str>,
    /// Lower case and sorted, each with its required value; `None` accepts any value.
    headers: Vec<(Cow<'a, str>, Option<&'a str>)>,
}

// === impl Route ===

impl Route {
    /// Returns all claims of the route.
    pub fn claims(&self) -> impl Iterator<Item = Claim<'_>> {
        self.matchers().iter().flat_map(Matcher::claims)
    }

    /// Counts the claims without building them.
    pub fn claim_count(&self) -> usize {
        let count = |matcher: &Matcher| {
            [&matcher.hosts, &matcher.paths, &matcher.models]
                .into_iter()
                .fold(1_usize, |count, choices| count.saturating_mul(choices.len().max(1)))
        };
        self.matchers().iter().map(count).fold(0, usize::saturating_add)
    }
}

// === impl Matcher ===

impl Matcher {
    /// Yields claims ordered by host, then path, then model: the order in which they are reported.
    fn claims(&self) -> impl Iterator<Item = Claim<'_>> {
        let exact = self.headers.iter().map(|(name, value)| (lower(name), Some(value.as_str())));
        let mut headers: Vec<_> = exact.chain(self.present.iter().map(|name| (lower(name), None))).collect();
        headers.sort();
        choices(&self.hosts).flat_map(move |host| {
            let headers = headers.clone();
            choices(&self.paths).flat_map(move |path| {
                let headers = headers.clone();
                choices(&self.models).map(move |model| Claim {
                    host: host.filter(|host| *host != "*").map(lower),
                    // `/a/` equals `/a`, and `/` is any path.
                    path: path.map(|path| path.trim_end_matches('/')).filter(|path| !path.is_empty()),
                    model,
                    headers: headers.clone(),
                })
            })
        })
    }
}

/// Returns the choices for one condition: a single `None` where the condition is absent.
fn choices(texts: &[String]) -> impl Iterator<Item = Option<&str>> {
    let any = texts.is_empty().then_some(None);
    any.into_iter().chain(texts.iter().map(|text| Some(text.as_str())))
}

fn lower(text: &str) -> Cow<'_, str> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        text.to_ascii_lowercase().into()
    } else {
        text.into()
    }
}

// === impl Claim ===

impl fmt::Display for Claim<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        words.extend(self.model.map(|model| format!("model \"{model}\"")));
        words.extend(self.host.as_deref().map(|host| format!("host \"{host}\"")));
        words.extend(self.path.map(|path| format!("path \"{path}\"")));
        if !self.headers.is_empty() {
            words.push("the same headers".to_owned());
        }
        if words.is_empty() { f.write_str("every request") } else { f.write_str(&words.join(", ")) }
    }
}
