//! Protection against cross-site requests and DNS rebinding. A loopback address protects against neither, as the browser
//! runs on this machine.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
};

use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderName, HeaderValue, header::ORIGIN};

use super::rule::{Host, host_name};
use crate::{
    config::Config,
    domain::{WebOrigin, is_local_host},
    error::ProxyError,
};

/// Rejects requests from pages of other sites and for foreign hosts.
pub struct CrossSiteGuard {
    /// Guards the request port; the admin port is always guarded. Separate from the rules, so that an unguarded request
    /// costs one load.
    guards_requests: AtomicBool,
    rules: ArcSwap<CrossSiteRules>,
}

/// Allowed origins and hosts besides local ones.
#[derive(Default)]
struct CrossSiteRules {
    /// `None` unless `cors` is configured: no response carries CORS headers.
    origins: Option<Vec<AllowedOrigin>>,
    hosts: Vec<Host>,
    /// Host name of this machine.
    own: Option<Box<str>>,
}

enum AllowedOrigin {
    Any,
    Exact(Box<str>),
}

/// Relation between a page and the target of its request (Fetch Metadata). Browsers send it to loopback addresses and
/// over TLS; pages cannot set it.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

// === impl CrossSiteGuard ===

impl Default for CrossSiteGuard {
    /// Guards the admin port alone.
    fn default() -> Self {
        Self { guards_requests: AtomicBool::new(false), rules: ArcSwap::default() }
    }
}

impl CrossSiteGuard {
    /// Applies a configuration. `listen`: the bound address.
    pub fn set(&self, config: &Config, listen: SocketAddr) {
        let own = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        self.rules.store(
            CrossSiteRules {
                origins: config
                    .cors
                    .as_ref()
                    .map(|cors| cors.origins.iter().map(AllowedOrigin::new).collect()),
                hosts: config.allowed_hosts.iter().map(|host| Host::new(strip_final_dot(host))).collect(),
                own: own.map(|own| own.trim().into()),
            }
            .into(),
        );
        let is_loopback = listen.ip().to_canonical().is_loopback();
        self.guards_requests.store(is_loopback || config.cors.is_some(), Ordering::Relaxed);
    }

    /// Returns `true` if the request port is guarded.
    pub fn guards_requests(&self) -> bool {
        self.guards_requests.load(Ordering::Relaxed)
    }

    /// Checks the host of a request, which may have a port. `is_ours`: accepts further names.
    ///
    /// # Errors
    /// [`ProxyError::ForeignHost`] for a name that is neither local nor allowed.
    pub fn check_host(&self, host: &str, is_ours: impl FnOnce(&str) -> bool) -> Result<(), ProxyError> {
        let name = strip_final_dot(host_name(host));
        if is_local_host(name) || self.rules.load().has_host(name) || is_ours(name) {
            return Ok(());
        }
        Err(ProxyError::ForeignHost(name.into()))
    }

    /// Checks the origin of a request to `host`.
    ///
    /// # Errors
    /// [`ProxyError::CrossSite`] for a page of another origin that is not allowed.
    pub fn check_page(&self, host: &str, headers: &HeaderMap) -> Result<(), ProxyError> {
        if !is_of_other_site(host, headers) || self.rules.load().allows_origins(headers) {
            return Ok(());
        }
        let origin =
            headers.get(ORIGIN).map(|origin| String::from_utf8_lossy(origin.as_bytes()).into_owned());
        Err(ProxyError::CrossSite(origin))
    }

    /// Returns the origin of a request if it is allowed, so that the page may read the response.
    pub fn listed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        // Copied, as a slice would keep the read buffer alive while the request is held.
        let origin =
            headers.get(ORIGIN).and_then(|origin| HeaderValue::from_bytes(origin.as_bytes()).ok())?;
        self.rules.load().allows_origins(headers).then_some(origin)
    }
}

// === impl CrossSiteRules ===

impl CrossSiteRules {
    fn has_host(&self, name: &str) -> bool {
        self.own.as_ref().is_some_and(|own| own.eq_ignore_ascii_case(name))
            || self.hosts.iter().any(|host| host.matches_host(name))
    }

    /// Returns `true` if all origins of a request are allowed. A request without one needs `*`.
    fn allows_origins(&self, headers: &HeaderMap) -> bool {
        let Some(allowed) = &self.origins else { return false };
        if allowed.iter().any(|allowed| matches!(allowed, AllowedOrigin::Any)) {
            return true;
        }
        let mut origins = headers.get_all(ORIGIN).iter().peekable();
        origins.peek().is_some()
            && origins.all(|origin| {
                origin.to_str().is_ok_and(|origin| allowed.iter().any(|allowed| allowed.is(origin)))
            })
    }
}

// === impl AllowedOrigin ===

impl AllowedOrigin {
    fn new(text: &String) -> Self {
        if text == "*" { Self::Any } else { Self::Exact(text.as_str().into()) }
    }

    fn is(&self, origin: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(allowed) => match (WebOrigin::parse(allowed), WebOrigin::parse(origin)) {
                (Some(allowed), Some(origin)) => allowed.is(&origin),
                _ => false,
            },
        }
    }
}

/// Returns `true` for a request from a page of another origin. `Sec-Fetch-Site` takes precedence over comparing `Origin`
/// with `Host`, which a proxy in front may have changed. Requests without either header are not from a page.
fn is_of_other_site(host: &str, headers: &HeaderMap) -> bool {
    let mut sites = headers.get_all(SEC_FETCH_SITE).iter().peekable();
    if sites.peek().is_some() {
        return !sites.all(|site| site == "same-origin" || site == "none");
    }
    let is_at_host = |origin: &HeaderValue| {
        origin.to_str().ok().and_then(WebOrigin::parse).is_some_and(|origin| origin.is_at(host))
    };
    !headers.get_all(ORIGIN).iter().all(is_at_host)
}

/// Strips the final dot of a fully qualified name.
fn strip_final_dot(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}
