//! A PostgreSQL server, as sinks and lookups reach it: the connection string, TLS, and what errors say.
//!
//! No secret leaves this file: errors name host and database, never the URL. [`link`] is a connection
//! whose every call has a deadline; [`pool`] is what the sinks of one server share.

mod link;
mod pool;
mod tls;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls};
use tokio_util::sync::CancellationToken;
use url::form_urlencoded;

pub use self::link::{CopyIn, Link, ServerError};
pub use self::pool::{Lent, PoolShare, PoolSpec, ServerPool};
use self::tls::{Handshake, Tls};

/// A server that does not answer the first packet in this time is tried again by the delivery.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the network may keep sent bytes unacknowledged: a dead peer must not hold a shard for
/// the quarter of an hour that a kernel waits by default.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// After this silence the kernel asks whether the peer still lives.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;

/// Longest time for names, the network and the server's greeting together. A server that is stopped
/// still accepts connections: its kernel does.
const GREETING_MAX: Duration = Duration::from_secs(30);

/// Time in which a connection that nobody needs any more may say goodbye.
const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Where a server is and how it is spoken to; nothing is connected.
#[derive(Clone)]
pub struct PostgresServer {
    config: Config,
    encryption: Encryption,
}

/// Whether a connection is encrypted.
#[derive(Clone)]
enum Encryption {
    /// By TLS with a server that proves who it is, or there is no connection.
    Required(Tls),
    /// By TLS where the server has it, whoever the server is; else in plain text. `is_said`: that plain text
    /// leaves this machine was said.
    Preferred { tls: Tls, is_said: Arc<AtomicBool> },
    /// Never.
    Off,
}

impl PostgresServer {
    /// Reads a connection string, `postgres://…` or `host=… dbname=…`, and fills in the timeouts that
    /// it leaves open.
    ///
    /// | `sslmode` | connection |
    /// |---|---|
    /// | `require`, `verify-ca`, `verify-full` | TLS, and the server's certificate and name are verified |
    /// | none, `prefer`, `allow` | TLS if the server has it, else plain text, with a warning where that leaves this machine. Nothing is verified: it protects from those who listen only |
    /// | `disable` | plain text |
    ///
    /// `sslrootcert` names a PEM file of the certificates to trust, in place of the system's. With `prefer`,
    /// as in libpq, a server whose certificate is not of these is spoken to in plain text.
    ///
    /// Source: PostgreSQL, "Connection Strings" and "SSL Support".
    ///
    /// # Errors
    /// What cannot be read, without its values.
    pub fn parse(url: &str) -> Result<Self, String> {
        refuse_bare_at(url)?;
        let mut text = Cow::Borrowed(url);
        let roots = parameter(&text, "sslrootcert");
        if let Some(parameter) = &roots {
            text.to_mut().replace_range(parameter.whole.clone(), "");
        }
        let mode = parameter(&text, "sslmode");
        if let Some(Parameter { value, place, .. }) = &mode {
            // What the parser does not know. `allow` begins in plain text in libpq; TLS first is no less.
            let known = match value.as_str() {
                value if value.starts_with("verify-") => Some("require"),
                "allow" => Some("prefer"),
                _ => None,
            };
            if let Some(known) = known {
                text.to_mut().replace_range(place.clone(), known);
            }
        }
        let mut config: Config = text.parse().map_err(|error: tokio_postgres::Error| {
            // The cause names the faulty part without its value, which may be the password.
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            format!("this is no PostgreSQL connection: {}", cause.unwrap_or(error.to_string()))
        })?;
        let roots = roots.map(|roots| roots.value);
        let encryption = match config.get_ssl_mode() {
            SslMode::Require => Encryption::Required(Tls::verified(roots.as_deref())?),
            SslMode::Disable => Encryption::Off,
            _ => {
                let tls = match &roots {
                    Some(roots) => Tls::verified(Some(roots))?,
                    None => Tls::unverified(),
                };
                Encryption::Preferred { tls, is_said: Arc::default() }
            }
        };
        if config.get_hosts().is_empty() {
            // TLS asks for a name to greet the server by, even where nothing is verified.
            for address in config.get_hostaddrs().to_vec() {
                config.host(address.to_string());
            }
        }
        if config.get_application_name().is_none() {
            config.application_name("shardmill");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        if config.get_keepalives_interval().is_none() {
            config.keepalives_idle(KEEPALIVE_IDLE.min(config.get_keepalives_idle()));
            config.keepalives_interval(KEEPALIVE_INTERVAL);
            config.keepalives_retries(KEEPALIVE_RETRIES);
        }
        Ok(Self { config, encryption })
    }

    /// Connects. Each call on the connection, and connecting itself, fails after `silence_max` without
    /// an answer.
    ///
    /// # Errors
    /// The server's or the network's, or its silence.
    pub async fn connect(&self, silence_max: Duration) -> Result<Link, ServerError> {
        let greeting_max = silence_max.min(GREETING_MAX);
        let ended = CancellationToken::new();
        let connecting = self.connect_client(ended.clone());
        let client = tokio::time::timeout(greeting_max, connecting)
            .await
            .map_err(|_| ServerError::Silent(greeting_max))??;
        Ok(Link::new(client, silence_max, ended.drop_guard()))
    }

    async fn connect_client(
        &self,
        ended: CancellationToken,
    ) -> Result<Client, tokio_postgres::Error> {
        let (tls, is_said) = match &self.encryption {
            Encryption::Off => return connect_plain(&self.config, ended).await,
            Encryption::Required(tls) => {
                return connect_tls(&self.config, tls, &Handshake::default(), ended).await;
            }
            Encryption::Preferred { tls, is_said } => (tls, is_said),
        };
        let handshake = Handshake::default();
        let connected = match connect_tls(&self.config, tls, &handshake, ended.clone()).await {
            Err(error) if plain_may_do(&error, &handshake) => {
                let plain = connect_plain(&self.config, ended).await?;
                let cause = format!("TLS failed ({})", describe(&error));
                self.warn_of_plain_text(is_said, &cause);
                return Ok(plain);
            }
            connected => connected?,
        };
        if !handshake.is_done() {
            self.warn_of_plain_text(is_said, "the server has no TLS");
        }
        Ok(connected)
    }

    /// Says once that what is sent and read can be seen on the network.
    fn warn_of_plain_text(&self, is_said: &AtomicBool, cause: &str) {
        let leaves = self.config.get_hosts().iter().any(|host| match host {
            Host::Tcp(host) => !is_loopback(host),
            #[cfg(unix)]
            Host::Unix(_) => false,
        });
        let leaves = match self.config.get_hostaddrs() {
            [] => leaves,
            addresses => addresses.iter().any(|address| !address.is_loopback()),
        };
        if leaves && !is_said.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{}: the connection is not encrypted, because {cause}: passwords and rows can be read on the \
                 network; add sslmode=verify-full to the connection string, or sslmode=disable if that is \
                 intended",
                self.place()
            );
        }
    }

    /// Host and database, for errors.
    pub fn place(&self) -> String {
        place(&self.config)
    }

    /// Hosts, ports and database, as a text that is the same for everybody who reaches them.
    pub fn destination(&self) -> String {
        let ports = self.config.get_ports();
        let port = |at: usize| ports.get(at).or(ports.first()).copied().unwrap_or(5432);
        let mut hosts: Vec<String> = (self.config.get_hosts().iter().enumerate())
            .map(|(at, host)| match host {
                Host::Tcp(host) => format!("{}:{}", host.to_ascii_lowercase(), port(at)),
                #[cfg(unix)]
                Host::Unix(path) => format!("{}:{}", path.display(), port(at)),
            })
            .collect();
        if hosts.is_empty() {
            let addresses = self.config.get_hostaddrs().iter().enumerate();
            hosts = addresses.map(|(at, address)| format!("{address}:{}", port(at))).collect();
        }
        let database = self.config.get_dbname().or(self.config.get_user()).unwrap_or_default();
        format!("{} database {database}", hosts.join(","))
    }
}

async fn connect_plain(
    config: &Config,
    ended: CancellationToken,
) -> Result<Client, tokio_postgres::Error> {
    let mut config = config.clone();
    config.ssl_mode(SslMode::Disable);
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(drive(connection, ended));
    Ok(client)
}

async fn connect_tls(
    config: &Config,
    tls: &Tls,
    handshake: &Handshake,
    ended: CancellationToken,
) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(tls.noting(handshake)).await?;
    tokio::spawn(drive(connection, ended));
    Ok(client)
}

/// Whether a connection that TLS was preferred for may succeed without: the handshake failed, or the server
/// lets this user in without TLS alone (`hostnossl` in pg_hba.conf).
fn plain_may_do(error: &tokio_postgres::Error, handshake: &Handshake) -> bool {
    let is_refused = error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    handshake.has_failed() || (handshake.is_done() && is_refused)
}

/// Whether a host is this machine, as far as its name says.
fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Refuses a URL with a second `@`. The parser ends the password at the first one, so that the rest of the
/// password would be taken for the host, and shown as such.
fn refuse_bare_at(url: &str) -> Result<(), String> {
    let after = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
    let before_query = after.and_then(|after| after.split('?').next()).unwrap_or_default();
    match before_query.matches('@').count() {
        0 | 1 => Ok(()),
        found => Err(format!(
            "expected one `@` in the connection URL, between password and host, found {found}; write an \
             `@` that belongs to the user, the password or the database as %40"
        )),
    }
}

/// Moves bytes for a client until the connection ends. Without a client it ends by itself, unless the
/// server owes it an answer: then it is closed after [`FAREWELL_MAX`].
async fn drive(
    connection: impl Future<Output = Result<(), tokio_postgres::Error>>,
    ended: CancellationToken,
) {
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = &mut connection => outcome,
        () = ended.cancelled() => {
            let farewell = tokio::time::timeout(FAREWELL_MAX, &mut connection).await;
            farewell.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(error = %describe(&error), "a connection to PostgreSQL ended");
    }
}

/// A parameter of a connection string.
struct Parameter {
    value: String,
    /// Where the value stands.
    place: Range<usize>,
    /// Where all of it stands, with what parts it from the next.
    whole: Range<usize>,
}

/// Finds a parameter of a connection string of either form.
fn parameter(text: &str, name: &str) -> Option<Parameter> {
    let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let begin = if is_url { text.find('?')? + 1 } else { 0 };
    let begins = |at: usize| {
        let before = text[begin..at].chars().next_back();
        before.is_none_or(|c| if is_url { c == '&' } else { c.is_whitespace() })
    };
    let mut places = text[begin..].match_indices(name).map(|(at, _)| begin + at);
    let start =
        places.find(|at| begins(*at) && text[at + name.len()..].trim_start().starts_with('='))?;
    let after = &text[start + name.len()..];
    let after = after.trim_start().strip_prefix('=')?;
    let after = if is_url { after } else { after.trim_start() };
    let value_start = text.len() - after.len();
    let (value, length) = match (is_url, after.strip_prefix('\'')) {
        (false, Some(quoted)) => {
            let end = quoted.find('\'')?;
            (quoted[..end].to_owned(), end + 2)
        }
        (false, None) => {
            let end = after.find(char::is_whitespace).unwrap_or(after.len());
            (after[..end].to_owned(), end)
        }
        (true, _) => {
            let end = after.find('&').unwrap_or(after.len());
            // As in a form: %2F is a slash.
            let pair = format!("v={}", &after[..end]);
            let value = form_urlencoded::parse(pair.as_bytes()).next().map(|(_, value)| value);
            (value.unwrap_or_default().into_owned(), end)
        }
    };
    let end = value_start + length;
    let rest = &text[end..];
    let separator = rest.len() - rest.strip_prefix('&').unwrap_or(rest).len();
    Some(Parameter { value, place: value_start..end, whole: start..end + separator })
}

/// Host and database, for errors.
fn place(config: &Config) -> String {
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(host)) => host.clone(),
        #[cfg(unix)]
        Some(Host::Unix(path)) => path.display().to_string(),
        None => match config.get_hostaddrs().first() {
            Some(address) => address.to_string(),
            None => "(no host)".into(),
        },
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let database = config.get_dbname().or(config.get_user()).unwrap_or("(default)");
    format!("PostgreSQL at {host}:{port}, database {database}")
}

/// An error with all that the server said, or with its causes.
pub fn describe(error: &tokio_postgres::Error) -> String {
    let Some(said) = error.as_db_error() else {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(deeper) = cause {
            // Writing into a String cannot fail.
            let _ = write!(text, ": {deeper}");
            cause = deeper.source();
        }
        return text;
    };
    let mut text = format!("{} (SQLSTATE {})", said.message(), said.code().code());
    for more in [said.detail(), said.hint()].into_iter().flatten() {
        let _ = write!(text, ": {more}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_found_in_either_form() {
        for (text, name, value, rest) in [
            ("postgres://h/d?sslmode=require&a=b", "sslmode", "require", "postgres://h/d?a=b"),
            (
                "postgresql://h/d?a=b&sslmode=verify-full",
                "sslmode",
                "verify-full",
                "postgresql://h/d?a=b&",
            ),
            (
                "postgres://h/d?sslrootcert=%2Fca+1.pem",
                "sslrootcert",
                "/ca 1.pem",
                "postgres://h/d?",
            ),
            ("host=h sslmode = 'require' dbname=d", "sslmode", "require", "host=h  dbname=d"),
            ("sslrootcert='my ca.pem'", "sslrootcert", "my ca.pem", ""),
        ] {
            let found = parameter(text, name).expect(text);
            assert_eq!(found.value, value, "{text}");
            let mut without = text.to_owned();
            without.replace_range(found.whole, "");
            assert_eq!(without, rest, "{text}");
        }
        for text in ["postgres://sslmode=require@h/d", "host=sslmode", "xsslmode=require host=h"] {
            assert!(parameter(text, "sslmode").is_none(), "{text}");
        }
    }

    #[test]
    fn wall_18_the_mode_is_as_in_libpq() {
        for (url, expected) in [
            ("postgres://h/d", "preferred"),
            ("postgres://h/d?sslmode=prefer", "preferred"),
            ("postgres://h/d?sslmode=allow", "preferred"),
            ("host=h sslmode=allow", "preferred"),
            ("hostaddr=10.0.0.1 dbname=d", "preferred"),
            ("postgres://sslmode=require@h/d", "preferred"),
            ("host=h sslmode=disable", "off"),
        ] {
            let server = PostgresServer::parse(url).unwrap_or_else(|why| panic!("{url}: {why}"));
            let found = match server.encryption {
                Encryption::Required(_) => "required",
                Encryption::Preferred { .. } => "preferred",
                Encryption::Off => "off",
            };
            assert_eq!(found, expected, "{url}");
        }
        for mode in ["", "sslmode=verify-full&"] {
            let missing = format!("postgres://u:secret@h/d?{mode}sslrootcert=/missing.pem");
            let why = PostgresServer::parse(&missing).err().expect("no such file");
            assert!(why.contains("/missing.pem") && !why.contains("secret"), "{why}");
        }
    }

    #[test]
    fn wall_18_loopback_is_known_by_its_names() {
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["db", "localhost.example.com", "10.0.0.1", "::2", "0.0.0.0"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn an_unreadable_string_shows_no_secret() {
        let error = PostgresServer::parse("postgres://u:secret@h:port/d").err().expect("no port");
        assert!(error.contains("no PostgreSQL connection") && !error.contains("secret"), "{error}");
    }
}
