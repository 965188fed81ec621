//! Checks the `Host` and `Origin` of requests, which a web page cannot forge.
//!
//! A web page may use a name that resolves to this machine (DNS rebinding). The browser then lets the page read what
//! the ports of this machine answer, as if it came from the page's own server. But the `Host` of such a request is that
//! name. An IP address or `localhost` cannot be rebound.

use std::net::{IpAddr, Ipv6Addr};

use axum::http::{HeaderMap, Request, Version, header};

/// Whether the `Host` of a request is an IP address, `localhost`, or one of these names. An HTTP/1.0 request needs no
/// `Host`, and no browser sends one.
pub fn is_direct<B>(request: &Request<B>, names: &[String]) -> bool {
    let is_without = request.version() <= Version::HTTP_10
        && request.uri().authority().is_none()
        && !request.headers().contains_key(header::HOST);
    is_without || host_of(request).is_some_and(|host| is_known(&host, names))
}

/// Returns the host of a request in lower case, without its port. `None`: there is none, there are several, or the text
/// after the host is not a port.
pub fn host_of<B>(request: &Request<B>) -> Option<String> {
    // RFC 9112, section 3.2.2: a host in the request target wins over the header.
    let host = match request.uri().authority() {
        Some(authority) => authority.as_str(),
        None => {
            let mut values = request.headers().get_all(header::HOST).iter();
            match (values.next(), values.next()) {
                (Some(value), None) => value.to_str().ok()?,
                _ => return None,
            }
        }
    };
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']')?;
            address.parse::<Ipv6Addr>().ok()?;
            (address, after)
        }
        None => {
            let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
            (name.strip_suffix('.').unwrap_or(name), port)
        }
    };
    (!name.is_empty() && is_port_or_none(port)).then(|| name.to_ascii_lowercase())
}

/// Whether a text is empty, or a colon and a port number.
fn is_port_or_none(text: &str) -> bool {
    let is_number =
        |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok();
    text.is_empty() || text.strip_prefix(':').is_some_and(is_number)
}

fn is_known(host: &str, names: &[String]) -> bool {
    host == "localhost"
        || host.parse::<IpAddr>().is_ok()
        || names.iter().any(|name| name.eq_ignore_ascii_case(host))
}

/// Whether a web page sent the request: browsers then add an `Origin`.
pub fn is_of_page(headers: &HeaderMap) -> bool {
    headers.contains_key(header::ORIGIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_05_a_host_is_an_address_localhost_or_listed() {
        let names = ["Mill.internal".to_owned()];
        for (hosts, uri, is_known) in [
            (&["127.0.0.1:9901"][..], "/status", true),
            (&["10.0.0.7"], "/status", true),
            (&["[::1]:9901"], "/status", true),
            (&["[2001:db8::7]"], "/status", true),
            (&["localhost:9901"], "/status", true),
            (&["LOCALHOST."], "/status", true),
            (&["mill.internal:9901"], "/status", true),
            (&["evil.example"], "/status", false),
            (&["evil.example:9901"], "/status", false),
            (&["localhost.evil.example"], "/status", false),
            (&["127.0.0.1.evil.example"], "/status", false),
            (&["evil.example:127.0.0.1"], "/status", false),
            (&["[::1"], "/status", false),
            (&["[::1].evil.example"], "/status", false),
            (&["[::1]evil.example"], "/status", false),
            (&["[::1]:9901.evil.example"], "/status", false),
            (&["[::1]."], "/status", false),
            (&["[::1]:"], "/status", false),
            (&["[127.0.0.1]"], "/status", false),
            (&["[localhost]"], "/status", false),
            (&["[evil.example]"], "/status", false),
            (&["::1"], "/status", false),
            (&["localhost:abc"], "/status", false),
            (&["localhost:"], "/status", false),
            (&["localhost:80:80"], "/status", false),
            (&["localhost:+80"], "/status", false),
            (&["localhost:65536"], "/status", false),
            (&["localhost:80.evil.example"], "/status", false),
            (&["localhost.."], "/status", false),
            (&["127.0.0.1:x"], "/status", false),
            (&["127.0.0.1:65535"], "/status", true),
            (&["evil.example@localhost"], "/status", false),
            (&["localhost@evil.example"], "/status", false),
            (&["mill.internal:abc"], "/status", false),
            (&["x.mill.internal"], "/status", false),
            (&[""], "/status", false),
            (&[], "/status", false),
            (&["localhost", "evil.example"], "/status", false),
            // The host in the request target counts.
            (&["localhost"], "http://evil.example/status", false),
            (&["evil.example"], "http://localhost/status", true),
        ] {
            let mut request = Request::builder().uri(uri);
            for host in hosts {
                request = request.header(header::HOST, *host);
            }
            let request = request.body(()).expect("a request");
            assert_eq!(is_direct(&request, &names), is_known, "{hosts:?} {uri}");
        }
    }

    #[test]
    fn wall_05_a_request_of_http_1_0_needs_no_host() {
        for (version, host, is_known) in [
            (Version::HTTP_10, None, true),
            (Version::HTTP_10, Some("evil.example"), false),
            (Version::HTTP_11, None, false),
        ] {
            let mut request = Request::builder().uri("/status").version(version);
            if let Some(host) = host {
                request = request.header(header::HOST, host);
            }
            let request = request.body(()).expect("a request");
            assert_eq!(is_direct(&request, &[]), is_known, "{version:?} {host:?}");
        }
    }
}
