//! A PostgreSQL server, as sinks and lookups reach it: the connection string, TLS, and what errors say.
//!
//! No secret leaves this file: errors name host and database, never the URL. [`link`] is a connection
//! whose every call has a deadline; [`pool`] is what the sinks of one server share.

mod link;
mod pool;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::sync::CancellationToken;
use url::form_urlencoded;

pub use self::link::{CopyIn, Link, ServerError};
pub use self::pool::{Lent, PoolShare, PoolSpec, ServerPool};

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
    /// `None`: without TLS.
    tls: Option<MakeRustlsConnect>,
}

impl PostgresServer {
    /// Reads a connection string, `postgres://…` or `host=… dbname=…`, and fills in the timeouts that
    /// it leaves open.
    ///
    /// `sslmode=require`, `verify-ca` and `verify-full` all speak TLS and verify the server's
    /// certificate and name: a mode that does not protects from nobody. `sslrootcert` names a PEM file
    /// of the certificates to trust, in place of the system's. Any other mode speaks without TLS.
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
        if let Some(Parameter { value, place, .. }) = &mode
            && value.starts_with("verify-")
        {
            text.to_mut().replace_range(place.clone(), "require");
        }
        let mut config: Config = text.parse().map_err(|error: tokio_postgres::Error| {
            // The cause names the faulty part without its value, which may be the password.
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            format!("this is no PostgreSQL connection: {}", cause.unwrap_or(error.to_string()))
        })?;
        let tls = match config.get_ssl_mode() {
            SslMode::Require => Some(tls(roots.map(|roots| roots.value).as_deref())?),
            _ => {
                // It would be tried, and be without TLS if the server liked that better.
                config.ssl_mode(SslMode::Disable);
                None
            }
        };
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
        Ok(Self { config, tls })
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
        match &self.tls {
            Some(tls) => {
                let (client, connection) = self.config.connect(tls.clone()).await?;
                tokio::spawn(drive(connection, ended));
                Ok(client)
            }
            None => {
                let (client, connection) = self.config.connect(NoTls).await?;
                tokio::spawn(drive(connection, ended));
                Ok(client)
            }
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

/// TLS that trusts the certificates of a PEM file, or those of the system.
fn tls(roots_file: Option<&str>) -> Result<MakeRustlsConnect, String> {
    let mut roots = RootCertStore::empty();
    match roots_file {
        Some(file) => {
            let unreadable = |cause: &dyn std::fmt::Display| {
                format!("the certificates of sslrootcert={file} cannot be read: {cause}")
            };
            let certificates = CertificateDer::pem_file_iter(Path::new(file))
                .map_err(|cause| unreadable(&cause))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|cause| unreadable(&cause))?;
                roots.add(certificate).map_err(|cause| unreadable(&cause))?;
            }
            if roots.is_empty() {
                return Err(unreadable(&"the file holds none"));
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err("this system trusts no certificate: name those to trust by \
                            sslrootcert=FILE in the connection string"
                    .into());
            }
        }
    }
    crate::tls::install();
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
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
    fn only_what_asks_for_tls_speaks_it() {
        for (url, tls) in [
            ("postgres://h/d", false),
            ("postgres://h/d?sslmode=prefer", false),
            ("host=h sslmode=disable", false),
            ("postgres://sslmode=require@h/d", false),
        ] {
            let server = PostgresServer::parse(url).unwrap_or_else(|why| panic!("{url}: {why}"));
            assert_eq!(server.tls.is_some(), tls, "{url}");
        }
        let missing = "postgres://u:secret@h/d?sslmode=verify-full&sslrootcert=/missing.pem";
        let why = PostgresServer::parse(missing).err().expect("no such file");
        assert!(why.contains("sslrootcert=/missing.pem") && !why.contains("secret"), "{why}");
    }

    #[test]
    fn an_unreadable_string_shows_no_secret() {
        let error = PostgresServer::parse("postgres://u:secret@h:port/d").err().expect("no port");
        assert!(error.contains("no PostgreSQL connection") && !error.contains("secret"), "{error}");
    }
}
