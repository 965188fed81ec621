//! Access rules of the admin port and the control port.
//!
//! | request | no token | `read_token` | `token` |
//! |---|---|---|---|
//! | `/health/…` | live, ready or blocked | the same | with causes |
//! | `/metrics`, `/status` | if no token is configured and the host is known | yes | with causes |
//! | changes, their history, record contents | no | no | yes |

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::PlainJson;
use shardmill_config::{AdminConfig, Secret};
use shardmill_core::record::Digest;
use shardmill_ports::names;

/// Right that a route requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Metrics and the status of the lanes.
    Read,
    /// Changes and record contents.
    Change,
}

/// Identity of a caller, by the token of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Sent the token.
    Owner,
    /// Sent the read token.
    Reader,
    /// Sent an unknown token, or several `Authorization` headers.
    Stranger,
    /// Sent no token.
    Nobody,
}

/// Reason for refusing a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    NoToken,
    WrongToken,
    ReadOnly,
    UnknownHost,
    Page,
}

/// Tokens and host names of a port. Clones share them.
#[derive(Clone)]
pub struct Access(Arc<Rules>);

struct Rules {
    /// `None`: no token is configured, and nothing can be changed at this port.
    token: Option<TokenDigest>,
    read_token: Option<TokenDigest>,
    /// Whether `/metrics` and `/status` require a token.
    is_reading_guarded: bool,
    hosts: Vec<String>,
    /// Place of the token, for messages.
    token_place: &'static str,
}

/// Digest of a token. Digests are compared instead of tokens, so that all have the same length, and in constant
/// time, so that the time says nothing about the token.
struct TokenDigest(Digest);

impl TokenDigest {
    fn of(token: &str) -> Self {
        Self(Digest::of(token.as_bytes()))
    }

    fn is(&self, other: &Self) -> bool {
        self.0.as_str().as_bytes().ct_eq(other.0.as_str().as_bytes()).into()
    }
}

impl Access {
    /// Returns the rules of an admin port. `own` is the token of this run; it is used if none is configured.
    /// Without any token nothing can be changed at the port.
    pub fn of(config: &AdminConfig, own: Option<&Secret>) -> Self {
        let (token, token_place) = match (&config.token, own) {
            (Some(token), _) => (Some(token), "the `token` of [admin]"),
            (None, Some(own)) => {
                (Some(own), "the token in admin.token of the pipeline's state folder")
            }
            (None, None) => (None, "the `read_token` of [admin]"),
        };
        Self(Arc::new(Rules {
            token: token.map(digest),
            read_token: config.read_token.as_ref().map(digest),
            is_reading_guarded: config.token.is_some() || config.read_token.is_some(),
            hosts: config.hosts.clone(),
            token_place,
        }))
    }

    /// Returns the rules of a control port: every request needs its token.
    pub(crate) fn with_token_only(token: &Secret) -> Self {
        Self(Arc::new(Rules {
            token: Some(digest(token)),
            read_token: None,
            is_reading_guarded: true,
            hosts: Vec::new(),
            token_place: "the token in control.json of the pipeline's state folder",
        }))
    }

    /// Identifies the caller.
    pub fn caller(&self, headers: &HeaderMap) -> Caller {
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let value = match (values.next(), values.next()) {
            (None, _) => return Caller::Nobody,
            (Some(value), None) => value,
            // With several headers, a proxy may have checked one of them and passed on both.
            (Some(_), Some(_)) => return Caller::Stranger,
        };
        let brought = value.to_str().ok().and_then(bearer).unwrap_or_default();
        let brought = TokenDigest::of(brought);
        let is_brought = |token: &TokenDigest| token.is(&brought);
        if self.0.token.as_ref().is_some_and(is_brought) {
            Caller::Owner
        } else if self.0.read_token.as_ref().is_some_and(is_brought) {
            Caller::Reader
        } else {
            Caller::Stranger
        }
    }

    fn admit(&self, right: Right, request: &Request) -> Result<(), Refusal> {
        let is_known = names::is_direct(request, &self.0.hosts);
        let is_of_page = names::is_of_page(request.headers());
        let caller = self.caller(request.headers());
        decide(right, caller, self.0.is_reading_guarded, is_known, is_of_page)
    }

    fn refused(&self, refusal: Refusal, request: &Request) -> Response {
        let place = self.0.token_place;
        let (status, cause) = match refusal {
            Refusal::NoToken => (
                StatusCode::UNAUTHORIZED,
                format!(
                    "missing token: expected {place}, as `Authorization: Bearer TOKEN`; shardmill's own commands \
                     find it themselves"
                ),
            ),
            Refusal::WrongToken => (
                StatusCode::UNAUTHORIZED,
                format!(
                    "invalid token: expected {place}, in one header `Authorization: Bearer TOKEN`"
                ),
            ),
            Refusal::ReadOnly => (
                StatusCode::FORBIDDEN,
                format!("`read_token` permits only /metrics and /status: expected {place}"),
            ),
            Refusal::UnknownHost => {
                let host = names::host_of(request).unwrap_or_default();
                let cause = format!(
                    "unknown host {host:?}: expected an address, localhost or a name in `hosts` of [admin]; \
                     add it there, or send the token"
                );
                (StatusCode::FORBIDDEN, cause)
            }
            Refusal::Page => (
                StatusCode::FORBIDDEN,
                "requests from web pages are refused without a token: send the token".to_owned(),
            ),
        };
        let mut response =
            (status, PlainJson(serde_json::json!({ "error": cause }))).into_response();
        if status == StatusCode::UNAUTHORIZED {
            let scheme = header::HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

/// Protects routes: only callers with the right may use them.
pub(crate) fn guarded(routes: Router, access: Access, right: Right) -> Router {
    let admit = move |State(access): State<Access>, request: Request, next: Next| async move {
        match access.admit(right, &request) {
            Ok(()) => next.run(request).await,
            Err(refusal) => access.refused(refusal, &request),
        }
    };
    routes.layer(middleware::from_fn_with_state(access, admit))
}

fn decide(
    right: Right,
    caller: Caller,
    is_reading_guarded: bool,
    is_host_known: bool,
    is_of_page: bool,
) -> Result<(), Refusal> {
    match (right, caller) {
        // A web page cannot know the token, whatever host name it used.
        (_, Caller::Owner) | (Right::Read, Caller::Reader) => Ok(()),
        (Right::Change, Caller::Reader) => Err(Refusal::ReadOnly),
        (_, Caller::Stranger) => Err(Refusal::WrongToken),
        (Right::Change, Caller::Nobody) => Err(Refusal::NoToken),
        (Right::Read, Caller::Nobody) if is_reading_guarded => Err(Refusal::NoToken),
        (Right::Read, Caller::Nobody) if !is_host_known => Err(Refusal::UnknownHost),
        (Right::Read, Caller::Nobody) if is_of_page => Err(Refusal::Page),
        (Right::Read, Caller::Nobody) => Ok(()),
    }
}

/// Returns the token of `Bearer TOKEN`. The scheme is case-insensitive (RFC 9110, section 11.1).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn digest(secret: &Secret) -> TokenDigest {
    TokenDigest::of(secret.reveal())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_05_each_right_asks_for_its_token() {
        use Caller::{Nobody, Owner, Reader, Stranger};
        use Right::{Change, Read};
        let (no, wrong, less) = (Refusal::NoToken, Refusal::WrongToken, Refusal::ReadOnly);
        let (host, page) = (Refusal::UnknownHost, Refusal::Page);
        // Right, caller, whether reading requires a token, whether the host is known, whether the request comes
        // from a web page.
        for (right, caller, guarded, known, of_page, decided) in [
            (Read, Nobody, false, true, false, Ok(())),
            (Read, Nobody, false, false, false, Err(host)),
            (Read, Nobody, false, true, true, Err(page)),
            (Read, Nobody, true, true, false, Err(no)),
            (Read, Reader, true, false, true, Ok(())),
            (Read, Owner, true, false, true, Ok(())),
            (Read, Stranger, false, true, false, Err(wrong)),
            (Change, Nobody, false, true, false, Err(no)),
            (Change, Nobody, true, true, false, Err(no)),
            (Change, Reader, true, true, false, Err(less)),
            (Change, Stranger, false, true, false, Err(wrong)),
            (Change, Owner, false, false, true, Ok(())),
        ] {
            let found = decide(right, caller, guarded, known, of_page);
            assert_eq!(found, decided, "{right:?} {caller:?} {guarded} {known} {of_page}");
        }
    }

    #[test]
    fn wall_15_without_a_configured_token_the_one_of_the_run_counts() {
        let config = AdminConfig {
            listen: ([127, 0, 0, 1], 9901).into(),
            token: None,
            read_token: Some(Secret::new("reads")),
            hosts: Vec::new(),
            connections_max: 8,
            per_peer_max: None,
        };
        let access = Access::of(&config, Some(&Secret::new("own")));
        let caller = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, header::HeaderValue::from_static(value));
            access.caller(&headers)
        };
        assert_eq!(access.caller(&HeaderMap::new()), Caller::Nobody);
        assert_eq!(caller("Bearer own"), Caller::Owner);
        assert_eq!(caller("bearer  own"), Caller::Owner);
        assert_eq!(caller("Bearer reads"), Caller::Reader);
        for other in ["Bearer ", "Bearer", "", "own", "Basic own", "Bearer own own"] {
            assert_eq!(caller(other), Caller::Stranger, "{other:?}");
        }
    }

    #[test]
    fn a_token_is_equal_to_itself_alone() {
        let token = TokenDigest::of("own token");
        assert!(token.is(&TokenDigest::of("own token")));
        // Its beginning, its end, more than it, the same length, and its digest in place of it.
        let digest = token.0.as_str();
        for other in
            ["", "own", "token", "own token ", "own\0token", "own tokem", "pwn token", digest]
        {
            assert!(!token.is(&TokenDigest::of(other)), "{other:?}");
        }
    }

    #[test]
    fn wall_05_of_two_tokens_none_counts() {
        let access = Access::with_token_only(&Secret::new("own"));
        for (first, second) in [("own", "own"), ("own", "other"), ("other", "own")] {
            let mut headers = HeaderMap::new();
            for token in [first, second] {
                let value = format!("Bearer {token}").parse().expect("a header");
                headers.append(header::AUTHORIZATION, value);
            }
            assert_eq!(access.caller(&headers), Caller::Stranger, "{first} {second}");
        }
    }
}
