//! The hosts of `stage.grant.http`: where the plugin of a stage may send requests, and with which headers.

use std::fmt;
use std::ops::RangeInclusive;

use http::{HeaderName, HeaderValue};
use toml::Spanned;
use url::Url;

use super::Secret;
use super::check::Check;
use super::raw::{RawHeaders, RawHttpHost, Text};

/// Default limit of an answer's body, in bytes. An answer is copied into the plugin's memory.
pub const RESPONSE_BYTES: usize = 1 << 20;
const RESPONSE_BYTES_ALLOWED: RangeInclusive<usize> = 1..=(64 << 20);

/// Headers that control how a message is transferred. Only the host sets them, in grants as in requests.
const TRAVEL_HEADERS: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

/// Host to which the plugin of a stage may send requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpHostConfig {
    /// Name or address as in a URL: lower case, IPv6 in brackets.
    pub host: String,
    /// Port; `None`: the default of the scheme.
    pub port: Option<u16>,
    /// Headers that the host adds to each request. Names are in lower case.
    pub headers: Vec<(String, Secret)>,
    /// Allowed methods, at least one.
    pub methods: Vec<HttpMethod>,
    /// Whether private addresses and requests without TLS are allowed.
    pub private: bool,
    /// Largest body of an answer, in bytes.
    pub response_bytes_max: usize,
}

/// Method that can be granted. CONNECT and TRACE cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are named as in RFC 9110")]
pub enum HttpMethod {
    Get,
    Head,
    Post,
    Put,
    Patch,
    Delete,
    Options,
}

impl HttpMethod {
    const ALL: [(&'static str, Self); 7] = [
        ("GET", Self::Get),
        ("HEAD", Self::Head),
        ("POST", Self::Post),
        ("PUT", Self::Put),
        ("PATCH", Self::Patch),
        ("DELETE", Self::Delete),
        ("OPTIONS", Self::Options),
    ];

    /// Methods of a grant without `methods`.
    const DEFAULT: [Self; 3] = [Self::Get, Self::Head, Self::Post];

    /// Returns the method as it is sent.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, method)| *method == self).map_or("GET", |(name, _)| name)
    }
}

impl fmt::Display for HttpMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a header controls the transfer of a message; `name` is in lower case.
pub fn is_travel_header(name: &str) -> bool {
    TRAVEL_HEADERS.contains(&name) || name.starts_with("proxy-")
}

/// Reads the hosts of `stage.grant.http`. Each host may have only one entry.
pub(super) fn http_hosts(raw: Vec<RawHttpHost>, check: &mut Check) -> Option<Vec<HttpHostConfig>> {
    let mut hosts: Vec<Option<HttpHostConfig>> = Vec::with_capacity(raw.len());
    for raw in raw {
        let span = raw.host.span();
        let host = http_host(raw, check);
        let is_same = |known: &HttpHostConfig| {
            host.as_ref().is_some_and(|host| (&host.host, host.port) == (&known.host, known.port))
        };
        if hosts.iter().flatten().any(is_same) {
            let help = "keep one of the two entries, with the headers and methods of both";
            check.problem(span, "this host is granted twice", help);
        }
        hosts.push(host);
    }
    hosts.into_iter().collect()
}

/// Reads one host.
fn http_host(raw: RawHttpHost, check: &mut Check) -> Option<HttpHostConfig> {
    let place = host(&raw.host, check);
    let headers = headers(raw.headers.as_ref(), check);
    let methods = methods(raw.methods.as_ref(), check);
    let response = check.size(&raw.response, RESPONSE_BYTES, RESPONSE_BYTES_ALLOWED);
    let (host, port) = place?;
    Some(HttpHostConfig {
        host,
        port,
        headers: headers?,
        methods: methods?,
        private: raw.private.unwrap_or(false),
        response_bytes_max: response?,
    })
}

/// Reads host and port in the form of a URL parser, so that both can be compared as text.
fn host(raw: &Spanned<Text>, check: &mut Check) -> Option<(String, Option<u16>)> {
    let text = &raw.get_ref().0;
    let plain = !text.contains(['/', '?', '#', '@', '\\', '*']) && text.trim() == text;
    // The parser drops the port 80, the default of `ws`. So a port that it does not return is taken from the text.
    let parsed = if plain { Url::parse(&format!("ws://{text}")).ok() } else { None };
    let found = parsed.as_ref().and_then(|url| {
        let written = text.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        let port = if text.ends_with(']') { None } else { url.port().or(written) };
        Some((url.host_str()?.to_owned(), port))
    });
    if found.is_none() {
        let message = format!("not a valid host: {text:?}");
        let help = "write \"api.example.com\" or \"api.example.com:8443\", without https:// and \
                    path; each host has an entry of its own";
        check.problem(raw.span(), message, help);
    }
    found
}

/// Reads headers that are sent; their names become lower case.
pub fn headers(raw: Option<&RawHeaders>, check: &mut Check) -> Option<Vec<(String, Secret)>> {
    let mut headers = Vec::new();
    let mut sound = true;
    for (name, value) in raw.into_iter().flatten() {
        let written = name.get_ref();
        let lower = written.to_ascii_lowercase();
        let mut refuse = |span, message: String, help: &str| {
            check.problem(span, message, help);
            sound = false;
        };
        if HeaderName::from_bytes(lower.as_bytes()).is_err() {
            let help = "write the name of a header, such as authorization";
            refuse(name.span(), format!("not a valid header name: {written:?}"), help);
        } else if is_travel_header(&lower) {
            let help = "remove it: it controls the transfer of a message, so only the host sets it";
            refuse(name.span(), format!("the header `{lower}` cannot be set"), help);
        } else if headers.iter().any(|(known, _)| *known == lower) {
            refuse(
                name.span(),
                format!("the header `{lower}` is set twice"),
                "keep one of the two",
            );
        } else if HeaderValue::from_str(&value.get_ref().0).is_err() {
            // The value may be a secret, so it is not repeated.
            let help = "a value is one line of text; does the variable end with a line break?";
            refuse(value.span(), format!("invalid value of header `{lower}`"), help);
        } else {
            headers.push((lower, Secret::new(value.get_ref().0.clone())));
        }
    }
    sound.then_some(headers)
}

fn methods(
    raw: Option<&Spanned<Vec<Spanned<Text>>>>,
    check: &mut Check,
) -> Option<Vec<HttpMethod>> {
    let Some(raw) = raw else { return Some(HttpMethod::DEFAULT.to_vec()) };
    let written = raw.get_ref();
    if written.is_empty() {
        let help = "name at least one, such as [\"GET\"], or take the host out";
        check.problem(raw.span(), "no method is granted", help);
        return None;
    }
    let noun = "method for a grant";
    let choose = |method: &Spanned<Text>| {
        check.choice(&Some(method.clone()), noun, HttpMethod::Get, &HttpMethod::ALL)
    };
    let methods: Vec<_> = written.iter().map(choose).collect();
    methods.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde::Deserialize;

    use super::*;
    use crate::{ConfigError, ConfigFile};

    #[derive(Deserialize)]
    struct Grant {
        http: Vec<RawHttpHost>,
    }

    /// Reads the hosts of `http = TEXT`.
    fn hosts(text: &str) -> Result<Vec<HttpHostConfig>, ConfigError> {
        let text = format!("http = {text}");
        let file = Arc::new(ConfigFile { path: "t.toml".into(), text: text.clone() });
        let grant: Grant = toml::from_str(&text).expect(&text);
        let mut check = Check::new(&file);
        let hosts = http_hosts(grant.http, &mut check);
        check.finish(hosts)
    }

    #[test]
    fn a_host_is_what_urls_have() {
        for (written, host, port) in [
            ("API.Example.com", "api.example.com", None),
            ("api.example.com:8443", "api.example.com", Some(8443)),
            ("api.example.com:443", "api.example.com", Some(443)),
            ("api.example.com:80", "api.example.com", Some(80)),
            ("bücher.example", "xn--bcher-kva.example", None),
            ("127.0.0.1:8080", "127.0.0.1", Some(8080)),
            ("0x7f.1", "127.0.0.1", None),
            ("[::1]", "[::1]", None),
            ("[0:0::1]:81", "[::1]", Some(81)),
        ] {
            let hosts = hosts(&format!("[{{ host = {written:?} }}]")).expect(written);
            assert_eq!((hosts[0].host.as_str(), hosts[0].port), (host, port), "{written}");
        }
        for written in [
            "",
            " ",
            "https://a.example",
            "a.example/",
            "a.example/x",
            "u@a.example",
            "*.a.example",
            "a.example:port",
            "a.example:70000",
            "::1",
            "a b",
            "a.example ",
            "a.example?x",
        ] {
            let error = hosts(&format!("[{{ host = {written:?} }}]")).expect_err(written);
            assert!(error.to_string().contains("not a valid host"), "{written}: {error}");
        }
    }

    #[test]
    fn a_host_alone_has_careful_defaults() {
        let hosts = hosts("[{ host = \"a.example\" }]").expect("a host");
        let expected = HttpHostConfig {
            host: "a.example".into(),
            port: None,
            headers: vec![],
            methods: vec![HttpMethod::Get, HttpMethod::Head, HttpMethod::Post],
            private: false,
            response_bytes_max: 1 << 20,
        };
        assert_eq!(hosts, [expected]);
    }

    #[test]
    fn every_key_arrives_and_no_secret_is_shown() {
        let hosts = hosts(
            "[{ host = \"a.example\", headers = { Authorization = \"Bearer hunter2\" }, \
             methods = [\"PUT\", \"GET\"], private = true, response = \"2 KiB\" }]",
        );
        let hosts = hosts.expect("a host");
        assert_eq!(hosts[0].headers, [("authorization".into(), Secret::new("Bearer hunter2"))]);
        assert_eq!(hosts[0].methods, [HttpMethod::Put, HttpMethod::Get]);
        assert_eq!((hosts[0].private, hosts[0].response_bytes_max), (true, 2048));
        assert!(!format!("{hosts:?}").contains("hunter2"));
    }

    #[test]
    fn what_cannot_be_granted_is_named() {
        for (keys, expected) in [
            ("methods = []", "no method is granted"),
            ("methods = [\"get\"]", "not a valid method for a grant: \"get\""),
            ("methods = [\"CONNECT\"]", "not a valid method for a grant: \"CONNECT\""),
            ("headers = { Host = \"x\" }", "the header `host` cannot be set"),
            ("headers = { proxy-authorization = \"x\" }", "`proxy-authorization` cannot be set"),
            ("headers = { \"a b\" = \"x\" }", "not a valid header name: \"a b\""),
            ("headers = { a = \"x\", A = \"y\" }", "the header `a` is set twice"),
            ("headers = { a = \"hunter2\\n\" }", "invalid value of header `a`"),
            ("response = \"1 GiB\"", "1 GiB is out of range"),
        ] {
            let error = hosts(&format!("[{{ host = \"a.example\", {keys} }}]")).expect_err(keys);
            let text = error.to_string();
            assert!(text.contains(expected) && !text.contains("hunter2"), "{keys}: {text}");
        }
        let twice = hosts("[{ host = \"a.example\" }, { host = \"A.example\" }]");
        assert!(twice.expect_err("twice").to_string().contains("granted twice"));
        hosts("[{ host = \"a.example\" }, { host = \"a.example:81\" }]").expect("two ports");
    }
}
