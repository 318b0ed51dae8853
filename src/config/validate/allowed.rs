//! Hosts to which routes of the cluster may send requests, other than pods of their namespace. Authors of routes are
//! not trusted with the proxy's network, which reaches more than they can.

use std::net::IpAddr;

use crate::config::Kubernetes;

/// Returns whether the host is allowed at this port. Names are compared literally; the owner of a zone decides what
/// its names resolve to, so list only trusted zones.
pub(super) fn allows(kubernetes: &Option<Kubernetes>, host: &str, port: u16) -> bool {
    let allowed = kubernetes.iter().flat_map(|kubernetes| &kubernetes.allowed_hosts);
    allowed.map(|entry| split(entry)).any(|(name, only)| {
        only.is_none_or(|only| only == port)
            && match name.strip_prefix('*') {
                Some(suffix) => below(plain(host), suffix),
                None => same(plain(host), plain(name)),
            }
    })
}

/// Splits an entry into host and port.
pub(super) fn split(entry: &str) -> (&str, Option<u16>) {
    match entry.rsplit_once(':') {
        // An IPv6 address without brackets cannot have a port.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => match port.parse() {
            Ok(port) if port > 0 => (host, Some(port)),
            _ => (entry, None),
        },
        _ => (entry, None),
    }
}

/// Strips the dot of a fully qualified name.
fn plain(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

fn same(one: &str, other: &str) -> bool {
    match (address(one), address(other)) {
        (Some(one), Some(other)) => one == other,
        (None, None) => one.eq_ignore_ascii_case(other),
        _ => false,
    }
}

fn address(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Returns whether `host` is a subdomain; `suffix` begins with a dot.
fn below(host: &str, suffix: &str) -> bool {
    address(host).is_none()
        && host.len() > suffix.len()
        && host.get(host.len() - suffix.len()..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(entries: &[&str], host: &str, port: u16) -> bool {
        let allowed_hosts = entries.iter().map(|entry| (*entry).to_owned()).collect();
        allows(&Some(Kubernetes { allowed_hosts, ..Kubernetes::default() }), host, port)
    }

    #[test]
    fn only_listed_values_are_allowed() {
        let list = [
            "envoy.gateway.svc",
            "*.models.example.com",
            "10.1.2.3:8000",
            "[fd00::1]",
            "api.example.com:443",
        ];
        for (host, port) in [
            ("envoy.gateway.svc", 80),
            ("Envoy.Gateway.svc.", 8080),
            ("a.models.example.com", 1),
            ("b.a.models.example.com", 1),
            ("10.1.2.3", 8000),
            ("[fd00:0::1]", 9),
            ("api.example.com", 443),
        ] {
            assert!(allowed(&list, host, port), "{host}:{port}");
        }
        for (host, port) in [
            ("envoy.gateway", 80),
            ("evil-envoy.gateway.svc", 80),
            ("envoy.gateway.svc.evil.example.org", 80),
            ("models.example.com", 1),
            (".models.example.com", 1),
            ("xmodels.example.com", 1),
            ("10.1.2.3", 8001),
            ("10.1.2.30", 8000),
            // Other spellings of an address that resolvers understand.
            ("167838211", 8000),
            ("0x0a.1.2.3", 8000),
            ("[::ffff:10.1.2.3]", 8000),
            ("[fd00::2]", 9),
            ("169.254.169.254", 80),
            ("api.example.com", 80),
            ("localhost", 80),
        ] {
            assert!(!allowed(&list, host, port), "{host}:{port}");
        }
        assert!(!allowed(&[], "envoy.gateway.svc", 80));
        assert!(!allows(&None, "envoy.gateway.svc", 80));
        assert!(!allowed(&["*.1.2.3"], "10.1.2.3", 80), "an address is below no name");
    }
}
