//! Requests that web pages of other sites have a browser send, and names of other sites that lead to this machine (DNS
//! rebinding). A loopback address stops neither: the browser is on this machine.

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

/// Stops requests of foreign pages and to foreign hosts.
pub struct CrossSiteGuard {
    /// Whether the request port is guarded; the admin port is in any case. Apart from the rules, so that a request that is
    /// not guarded costs a load.
    guards_requests: AtomicBool,
    rules: ArcSwap<Rules>,
}

/// What is let through beside what is local.
#[derive(Default)]
struct Rules {
    /// `None` unless configured: then no answer carries a header of CORS.
    origins: Option<Vec<AllowedOrigin>>,
    hosts: Vec<Host>,
    /// The name of this machine.
    own: Option<Box<str>>,
}

enum AllowedOrigin {
    Any,
    Exact(Box<str>),
}

/// How the sender of a request is related to its page (Fetch Metadata). Browsers send it to loopback addresses and over TLS,
/// and pages cannot set it.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

// === impl CrossSiteGuard ===

impl Default for CrossSiteGuard {
    /// Guards the admin port alone.
    fn default() -> Self {
        Self { guards_requests: AtomicBool::new(false), rules: ArcSwap::default() }
    }
}

impl CrossSiteGuard {
    /// Takes over what a configuration says; `listen` is the address that is bound.
    pub fn set(&self, config: &Config, listen: SocketAddr) {
        let own = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        self.rules.store(
            Rules {
                origins: config
                    .cors
                    .as_ref()
                    .map(|cors| cors.origins.iter().map(AllowedOrigin::new).collect()),
                hosts: config.allowed_hosts.iter().map(|host| Host::new(plain(host))).collect(),
                own: own.map(|own| own.trim().into()),
            }
            .into(),
        );
        let is_loopback = listen.ip().to_canonical().is_loopback();
        self.guards_requests.store(is_loopback || config.cors.is_some(), Ordering::Relaxed);
    }

    /// Returns whether the request port is guarded.
    pub fn guards_requests(&self) -> bool {
        self.guards_requests.load(Ordering::Relaxed)
    }

    /// Checks the host of a request, which may have a port; `is_ours` says which names are ours beside those that are
    /// configured.
    ///
    /// # Errors
    /// When it may be another site's.
    pub fn check_host(&self, host: &str, is_ours: impl FnOnce(&str) -> bool) -> Result<(), ProxyError> {
        let name = plain(host_name(host));
        if is_local_host(name) || self.rules.load().has_host(name) || is_ours(name) {
            return Ok(());
        }
        Err(ProxyError::ForeignHost(name.into()))
    }

    /// Checks the page that has sent a request to `host`, if one has.
    ///
    /// # Errors
    /// When its origin is another one than that of `host`, and not listed.
    pub fn check_page(&self, host: &str, headers: &HeaderMap) -> Result<(), ProxyError> {
        if !is_of_other_site(host, headers) || self.rules.load().allows_origins(headers) {
            return Ok(());
        }
        let origin =
            headers.get(ORIGIN).map(|origin| String::from_utf8_lossy(origin.as_bytes()).into_owned());
        Err(ProxyError::CrossSite(origin))
    }

    /// Returns the origin of the page that has sent a request if it is listed: such a page may read the answer.
    pub fn listed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        // A copy: a part of the read buffer would keep all of it for as long as the request is held.
        let origin =
            headers.get(ORIGIN).and_then(|origin| HeaderValue::from_bytes(origin.as_bytes()).ok())?;
        self.rules.load().allows_origins(headers).then_some(origin)
    }
}

// === impl Rules ===

impl Rules {
    fn has_host(&self, name: &str) -> bool {
        self.own.as_ref().is_some_and(|own| own.eq_ignore_ascii_case(name))
            || self.hosts.iter().any(|host| host.is(name))
    }

    /// Whether all origins that a request names are listed; of one that names none, whether all are allowed.
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

/// Whether a page sent a request that did not come from where the request goes. The browser's own word counts more than a
/// comparison with `Host`: what stands in front may have changed that. No browser has sent what has neither header.
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

/// A dot at the end says that the name is whole, and nothing else.
fn plain(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}
