//! Origins of web pages.

use std::net::IpAddr;

/// The origin of a web page (RFC 6454): scheme, host and port. Borrowed, since it is parsed for every request of a
/// page.
#[derive(Clone, Copy, Debug)]
pub struct WebOrigin<'a> {
    scheme: &'a str,
    host: &'a str,
    /// `None` for the scheme's default port.
    port: Option<u16>,
}

// === impl WebOrigin ===

impl<'a> WebOrigin<'a> {
    /// Parses `scheme://host[:port]`. Returns `None` for `null`, which any page can have.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let is_of_scheme = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
        let is_of_host = |byte: u8| byte.is_ascii_graphic() && !b"/?#@\\,*".contains(&byte);
        let (host, port) = split_port(authority)?;
        let is_whole = !scheme.is_empty()
            && scheme.bytes().all(is_of_scheme)
            && !host.is_empty()
            && host.bytes().all(is_of_host)
            && (host.starts_with('[') || !host.contains(':'));
        is_whole.then_some(Self {
            scheme,
            host,
            port: port.filter(|port| default_port(scheme) != Some(*port)),
        })
    }

    /// Returns whether both origins are equal.
    pub fn is(&self, other: &Self) -> bool {
        self.scheme.eq_ignore_ascii_case(other.scheme)
            && self.host.eq_ignore_ascii_case(other.host)
            && self.port == other.port
    }

    /// Returns whether `authority`, the `Host` of a request, belongs to this origin. The scheme is ignored: a proxy in
    /// front may terminate TLS.
    pub fn is_at(&self, authority: &str) -> bool {
        let Some((host, port)) = split_port(authority) else { return false };
        let port = port.filter(|port| default_port(self.scheme) != Some(*port));
        self.host.eq_ignore_ascii_case(host) && self.port == port
    }
}

/// Returns whether a host (without port) cannot belong to a page on the Internet: a loopback or private address, or a
/// name that public DNS does not resolve.
pub fn is_local_host(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    match address.parse::<IpAddr>() {
        Ok(address) => is_local_address(address.to_canonical()),
        // `.localhost` (RFC 6761), `.local` (RFC 6762), `.internal` (reserved by ICANN in 2024); Services of a cluster.
        Err(_) => {
            let name = host.strip_suffix('.').unwrap_or(host);
            let (_, zone) = name.rsplit_once('.').unwrap_or(("", name));
            let zones = ["localhost", "local", "internal", "svc"];
            !name.is_empty() && (zone == name || zones.iter().any(|local| zone.eq_ignore_ascii_case(local)))
        }
    }
}

fn is_local_address(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            // Carrier-grade NAT (RFC 6598), also used by clusters and VPNs.
            let is_shared = address.octets()[0] == 100 && address.octets()[1] & 0xc0 == 64;
            address.is_loopback()
                || address.is_private()
                || address.is_link_local()
                || address.is_unspecified()
                || is_shared
        }
        IpAddr::V6(address) => {
            address.is_loopback()
                || address.is_unique_local()
                || address.is_unicast_link_local()
                || address.is_unspecified()
        }
    }
}

/// Splits off the port; `None` if it is invalid.
fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    match authority.rfind([':', ']']) {
        Some(at) if authority.as_bytes()[at] == b':' => {
            let digits = &authority[at + 1..];
            let is_port = digits.bytes().all(|byte| byte.is_ascii_digit());
            Some((&authority[..at], Some(digits.parse().ok().filter(|_| is_port)?)))
        }
        _ => Some((authority, None)),
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        _ if scheme.eq_ignore_ascii_case("http") => Some(80),
        _ if scheme.eq_ignore_ascii_case("https") => Some(443),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_is_scheme_host_and_port() {
        let is = |one, other| WebOrigin::parse(one).unwrap().is(&WebOrigin::parse(other).unwrap());
        for (one, other) in [
            ("https://chat.example", "HTTPS://Chat.Example"),
            ("https://chat.example", "https://chat.example:443"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("app://obsidian.md", "app://obsidian.md"),
        ] {
            assert!(is(one, other), "{one} {other}");
        }
        for (one, other) in [
            ("https://chat.example", "http://chat.example"),
            ("https://chat.example", "https://chat.example:8443"),
            ("https://chat.example", "https://chat.example."),
            ("https://chat.example", "https://evil-chat.example"),
            ("http://[::1]:3000", "http://[::1]"),
        ] {
            assert!(!is(one, other), "{one} {other}");
        }
        for text in [
            "null",
            "",
            "*",
            "chat.example",
            "https://",
            "://chat.example",
            "https://chat.example/",
            "https://chat.example:",
            "https://chat.example:x",
            "https://chat.example:99999",
            "https://me@chat.example",
            "https://a https://b",
            "https://::1",
        ] {
            assert!(WebOrigin::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn origin_is_at_its_own_host() {
        let is_at = |origin, host| WebOrigin::parse(origin).unwrap().is_at(host);
        assert!(is_at("http://localhost:8080", "LOCALHOST:8080"));
        assert!(is_at("http://[::1]:8080", "[::1]:8080"));
        assert!(is_at("https://chat.example", "chat.example"), "TLS is terminated in front");
        assert!(is_at("https://chat.example", "chat.example:443"));
        assert!(!is_at("http://localhost:3000", "localhost:8080"));
        assert!(!is_at("http://localhost:8080", "localhost"));
        assert!(!is_at("https://evil.example", "127.0.0.1:8080"));
    }

    #[test]
    fn local_hosts_are_those_that_no_page_can_have() {
        for host in [
            "localhost",
            "LOCALHOST.",
            "api.localhost",
            "box.local",
            "gpu.internal",
            "anteroom-admin.models.svc",
            "anteroom-admin.models.svc.cluster.local",
            "box",
            "127.0.0.1",
            "127.9.9.9",
            "10.1.2.3",
            "192.168.0.7",
            "172.16.0.1",
            "169.254.1.1",
            "100.64.0.1",
            "0.0.0.0",
            "[::1]",
            "[fd00::7]",
            "[fe80::7]",
            "[::ffff:10.1.2.3]",
        ] {
            assert!(is_local_host(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example.",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evillocal.example",
            "8.8.8.8",
            "100.128.0.1",
            "172.32.0.1",
            "[2001:db8::1]",
            "[::ffff:8.8.8.8]",
            ".",
            "",
        ] {
            assert!(!is_local_host(host), "{host}");
        }
    }
}
