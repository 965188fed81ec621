//! Client of PostgreSQL servers for sinks and lookups: connection strings, TLS, calls with deadlines, a pool.
//!
//! Errors name host and database but never the URL, so no secret leaves this crate. [`link`] is a connection on which
//! every call has a deadline; [`pool`] is shared by the sinks of one server.
//!
//! This crate does not know what is written to tables (sinks) or looked up (`plugin`). It uses `core` and `tls`; its
//! only heavy dependency is tokio-postgres.

mod answer;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod link;
pub mod name;
mod plain;
mod pool;
mod tls;

use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Config, NoTls};
use tokio_util::sync::CancellationToken;
use url::form_urlencoded;

use self::answer::Prepared;
use self::link::{Connected, EndCause};
pub use self::link::{CopyIn, Link, ServerError};
pub use self::pool::{Lent, PoolShare, PoolSpec, ServerPool};
use self::tls::{Connector, Handshake, Mode, Tls};
use shardmill_core::boxed;
use shardmill_core::escape::QUOTED_BYTES_MAX;
use shardmill_core::masking::{sanitized, sanitized_within};

/// Time for one attempt to connect to a host. After it, the delivery tries again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long sent bytes may stay unacknowledged. Without it a kernel waits for a quarter of an hour, and a dead peer
/// would block a shard for that time.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// Silence after which the kernel checks whether the peer is alive.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;

/// Longest time for name resolution, connecting and the greeting together. A server process that is stopped still
/// accepts connections, because its kernel does.
const GREETING_MAX: Duration = Duration::from_secs(30);

/// Time for the orderly end of a connection that is no longer needed.
const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Bytes of an SQLSTATE that are shown. It has five, if the peer is a PostgreSQL server.
const CODE_BYTES_MAX: usize = 16;

/// Address and settings of a server; not connected.
#[derive(Clone)]
pub struct PostgresServer {
    config: Config,
    encryption: Encryption,
}

/// Whether connections are encrypted.
#[derive(Clone)]
enum Encryption {
    /// TLS with a valid certificate, or no connection.
    Required {
        tls: Tls,
        /// File of `sslrootcert`, for errors.
        roots: Option<String>,
    },
    /// TLS without verification if the server has it, else plain text.
    Preferred(Tls),
    /// Never.
    Off,
}

impl PostgresServer {
    /// Parses a connection string, `postgres://…` or `host=… dbname=…`, and sets the timeouts that it does not
    /// contain.
    ///
    /// | `sslmode` | connection |
    /// |---|---|
    /// | `require`, `verify-ca`, `verify-full` | TLS, and the server's certificate and name are verified |
    /// | none, `prefer`, `allow`, with `sslrootcert` | the same |
    /// | none, `prefer`, `allow`, without it | TLS if the server has it, else plain text; nothing is verified |
    /// | `disable` | plain text |
    ///
    /// A connection in plain text to another machine is reported by a warning, unless `disable` asks for it. TLS
    /// without verification protects only against passive listeners.
    ///
    /// `sslrootcert` names a PEM file of the certificates to trust instead of the system's. Here it always means that
    /// the server is verified. libpq falls back to plain text with `prefer`, although a user who names this file
    /// expects verification.
    ///
    /// Source: PostgreSQL, "Connection Strings" and "SSL Support".
    ///
    /// # Errors
    /// The part that is invalid, without its value.
    pub fn parse(url: &str) -> Result<Self, String> {
        let (mut config, roots) = read(url)?;
        let encryption = match (config.get_ssl_mode(), roots) {
            (SslMode::Disable, _) => Encryption::Off,
            (SslMode::Require, None) => {
                Encryption::Required { tls: Tls::verified(None)?, roots: None }
            }
            (_, Some(roots)) => {
                let tls = Tls::verified(Some(&roots))?;
                // Otherwise the client would continue in plain text if the server has no TLS.
                config.ssl_mode(SslMode::Require);
                Encryption::Required { tls, roots: Some(roots) }
            }
            (_, None) => Encryption::Preferred(Tls::unverified()),
        };
        let sockets =
            config.get_hosts().iter().filter(|host| matches!(host, Host::Unix(_))).count();
        if sockets != 0 && sockets != config.get_hosts().len() {
            return Err("expected either host names or folders of sockets, found both".into());
        }
        if config.get_hosts().is_empty() {
            // TLS needs a server name, even if nothing is verified.
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

    /// Connects. Connecting, and each later call on the connection, fails after `silence_max` without an answer;
    /// connecting fails after 30 s at the latest.
    ///
    /// # Errors
    /// Error of the server or the network, or no answer in time.
    #[boxed]
    pub async fn connect(&self, silence_max: Duration) -> Result<Link, ServerError> {
        let greeting_max = silence_max.min(GREETING_MAX);
        let ended = CancellationToken::new();
        let connecting = self.connect_client(ended.clone());
        let client = tokio::time::timeout(greeting_max, connecting)
            .await
            .map_err(|_| ServerError::Silent(greeting_max))??;
        Ok(Link::new(client, silence_max, ended.drop_guard()))
    }

    async fn connect_client(&self, ended: CancellationToken) -> Result<Connected, ServerError> {
        let handshake = Handshake::default();
        match &self.encryption {
            Encryption::Off => {
                let connected = connect(&self.config, Mode::Off, &handshake, ended).await;
                connected.map_err(ServerError::Failed)
            }
            Encryption::Required { tls, roots } => {
                let mode = Mode::Required(tls.clone());
                let connected = connect(&self.config, mode, &handshake, ended).await;
                connected.map_err(|error| match roots {
                    Some(roots) if handshake.has_failed() || handshake.was_refused() => {
                        ServerError::Unverified { error, roots: roots.clone() }
                    }
                    _ => ServerError::Failed(error),
                })
            }
            Encryption::Preferred(tls) => {
                let mode = Mode::Preferred(tls.clone());
                let connected = match connect(&self.config, mode, &handshake, ended.clone()).await {
                    Err(error) if plain_may_do(&error, &handshake) => {
                        let plain =
                            connect(&self.config, Mode::Off, &Handshake::default(), ended).await?;
                        self.warn_of_plain_text(&format!("TLS failed ({})", describe(&error)));
                        return Ok(plain);
                    }
                    connected => connected?,
                };
                if !handshake.is_done() {
                    self.warn_of_plain_text("the server has no TLS");
                }
                Ok(connected)
            }
        }
    }

    /// Warns once per server that the network can read what is sent.
    fn warn_of_plain_text(&self, cause: &str) {
        let leaves = self.config.get_hosts().iter().any(|host| match host {
            Host::Tcp(host) => !is_loopback(host),
            #[cfg(unix)]
            Host::Unix(_) => false,
        });
        let leaves = match self.config.get_hostaddrs() {
            [] => leaves,
            addresses => addresses.iter().any(|address| !address.is_loopback()),
        };
        if leaves && plain::is_first(self.servers()) {
            tracing::warn!(
                "{}: the connection is not encrypted, because {cause}: passwords and rows can be read on the \
                 network; add sslmode=verify-full to the connection string, or sslmode=disable if this is \
                 intended",
                self.place()
            );
        }
    }

    /// Returns host and database, for errors.
    pub fn place(&self) -> String {
        place(&self.config)
    }

    /// Returns hosts, ports and database, as a text that does not depend on who connects.
    pub fn destination(&self) -> String {
        let database = self.config.get_dbname().or(self.config.get_user()).unwrap_or_default();
        format!("{} database {database}", self.servers())
    }

    /// Returns the schema of tables without one, if `options` in the connection string sets it. The search path of a
    /// role or a database is not known here.
    pub fn first_schema(&self) -> Option<String> {
        first_schema(self.config.get_options()?)
    }

    /// Returns hosts and ports.
    fn servers(&self) -> String {
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
        hosts.join(",")
    }
}

/// Connects, and starts the task that moves the connection's bytes. Unix sockets have no TLS, and their server runs on
/// this machine, so its answers are not limited.
async fn connect(
    config: &Config,
    mode: Mode,
    handshake: &Handshake,
    ended: CancellationToken,
) -> Result<Connected, tokio_postgres::Error> {
    let (end_cause, prepared) = (EndCause::default(), Prepared::default());
    #[cfg(unix)]
    if !matches!(mode, Mode::Required(_))
        && config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_)))
    {
        let mut config = config.clone();
        config.ssl_mode(SslMode::Disable);
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(drive(connection, end_cause.clone(), ended));
        return Ok(Connected { client, end_cause, prepared });
    }
    let (config, connector) = Connector::new(config, mode, handshake, &prepared);
    let (client, connection) = config.connect(connector).await?;
    tokio::spawn(drive(connection, end_cause.clone(), ended));
    Ok(Connected { client, end_cause, prepared })
}

/// Whether a plain connection may succeed after preferred TLS failed: the handshake failed, or the server accepts this
/// user only without TLS (`hostnossl` in pg_hba.conf).
fn plain_may_do(error: &tokio_postgres::Error, handshake: &Handshake) -> bool {
    let is_refused = error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    handshake.has_failed() || (handshake.is_done() && is_refused)
}

/// Returns the first schema of the search path that server options set; the last setting counts. `$user` is skipped,
/// because that schema may not exist. Source: PostgreSQL, "postgres", `-c`, and "search_path".
fn first_schema(options: &str) -> Option<String> {
    let mut words = option_words(options).into_iter().peekable();
    let mut path = None;
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("-c").or_else(|| word.strip_prefix("--")) {
            Some("") if word == "-c" => words.next().unwrap_or_default(),
            Some(setting) => setting.to_owned(),
            None => continue,
        };
        if let Some((name, value)) = setting.split_once('=')
            && name.trim().replace('-', "_").eq_ignore_ascii_case("search_path")
        {
            path = Some(value.to_owned());
        }
    }
    let path = path?;
    path.split(',').map(str::trim).filter(|schema| !schema.trim_matches('"').eq("$user")).find_map(
        |schema| match schema.strip_prefix('"').and_then(|schema| schema.strip_suffix('"')) {
            Some(quoted) => Some(quoted.replace("\"\"", "\"")),
            None => (!schema.is_empty()).then(|| schema.to_lowercase()),
        },
    )
}

/// Splits options into words. A backslash escapes the next character.
fn option_words(options: &str) -> Vec<String> {
    let (mut words, mut word, mut characters) = (Vec::new(), String::new(), options.chars());
    while let Some(c) = characters.next() {
        match c {
            '\\' => word.extend(characters.next()),
            c if c.is_whitespace() => words.extend(Some(std::mem::take(&mut word))),
            c => word.push(c),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

/// Whether a host is this machine, according to its name or address.
fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Parses a connection string like the client library, and also the file of certificates to trust.
fn read(url: &str) -> Result<(Config, Option<String>), String> {
    refuse_bare_at(url)?;
    let (mut text, mut roots) = (url.to_owned(), None);
    // From the end, so that earlier places stay valid. Of two values the last one counts.
    for parameter in parameters(url).into_iter().rev() {
        match parameter.name.as_str() {
            "sslrootcert" => {
                text.replace_range(parameter.whole, "");
                roots.get_or_insert(parameter.value);
            }
            // The library does not know these values.
            "sslmode" if ["verify-ca", "verify-full"].contains(&parameter.value.as_str()) => {
                text.replace_range(parameter.place, "require");
            }
            // In libpq, `allow` begins in plain text. TLS first is not weaker.
            "sslmode" if parameter.value == "allow" => {
                text.replace_range(parameter.place, "prefer");
            }
            _ => {}
        }
    }
    let config = text.parse().map_err(|error: tokio_postgres::Error| {
        // The cause names the invalid part without its value, which may be the password.
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!("invalid PostgreSQL connection string: {}", cause.unwrap_or(error.to_string()))
    })?;
    Ok((config, roots))
}

/// Refuses a URL with an `@` anywhere but before the host. The parser ends the password at the first `@`, so the rest
/// of the password, or a part of a parameter, would become the host, and be shown in errors.
fn refuse_bare_at(url: &str) -> Result<(), String> {
    let Some(after) = without_scheme(url) else { return Ok(()) };
    let before = after.find('@').map_or("", |at| &after[..at]);
    let is_parameter = before.split_once('?').is_some_and(|(_, query)| query.contains('='));
    match after.matches('@').count() {
        0 => Ok(()),
        1 if is_parameter => Err(
            "expected the `@` of the connection URL between password and host, found it after a `?`; \
             write an `@` of a parameter as %40, and a `?` of the user or password as %3F"
                .into(),
        ),
        1 => Ok(()),
        found => Err(format!(
            "expected one `@` in the connection URL, between password and host, found {found}; write an \
             `@` that belongs to the user, the password, the database or a parameter as %40"
        )),
    }
}

/// Returns the text after the scheme of a connection URL.
fn without_scheme(url: &str) -> Option<&str> {
    url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"))
}

/// Moves bytes for a client until the connection ends. When the client is dropped, the connection ends, unless an
/// answer of the server is outstanding: then it is closed after [`FAREWELL_MAX`].
async fn drive(
    connection: impl Future<Output = Result<(), tokio_postgres::Error>>,
    end_cause: EndCause,
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
        end_cause.note(&error);
        tracing::debug!(error = %describe(&error), "a connection to PostgreSQL ended");
    }
}

/// Parameter of a connection string.
#[derive(Debug)]
struct Parameter {
    name: String,
    value: String,
    /// Place of the value, with its quotes.
    place: Range<usize>,
    /// Place of the parameter, with the separator after it.
    whole: Range<usize>,
}

/// Finds the parameters of a connection string of either form exactly where the client library finds them. A value may
/// contain text that looks like another parameter.
fn parameters(text: &str) -> Vec<Parameter> {
    match without_scheme(text) {
        Some(after) => url_parameters(text, text.len() - after.len()),
        None => keyword_parameters(text),
    }
}

/// Finds the parameters of a URL whose scheme ends at `start`.
fn url_parameters(text: &str, start: usize) -> Vec<Parameter> {
    let host = text[start..].find('@').map_or(start, |at| start + at + 1);
    let Some(query) = text[host..].find('?') else { return Vec::new() };
    let (mut at, mut found) = (host + query + 1, Vec::new());
    while let Some(equals) = text[at..].find('=').map(|equals| at + equals) {
        let begin = equals + 1;
        let end = text[begin..].find('&').map_or(text.len(), |end| begin + end);
        let next = text.len().min(end + 1);
        let (name, value) = (decoded(&text[at..equals]), decoded(&text[begin..end]));
        found.push(Parameter { name, value, place: begin..end, whole: at..next });
        at = next;
    }
    found
}

/// Decodes a part of a URL's query. Unlike in a form, a plus stays a plus.
fn decoded(part: &str) -> String {
    let pair = format!("v={}", part.replace('+', "%2B"));
    let value = form_urlencoded::parse(pair.as_bytes()).next().map(|(_, value)| value);
    value.unwrap_or_default().into_owned()
}

/// Finds the parameters of the form `name = value`, up to the first text that is not one.
fn keyword_parameters(text: &str) -> Vec<Parameter> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    let place = |rest: &str| text.len() - rest.len();
    while let Some(end) = rest.find(|c: char| c == '=' || c.is_whitespace()) {
        let (name, after) = rest.split_at(end);
        if name.is_empty() {
            break;
        }
        let Some(written) = after.trim_start().strip_prefix('=') else { break };
        let written = written.trim_start();
        let Some((value, after)) = keyword_value(written) else { break };
        let (begin, end) = (place(written), place(after));
        let (name, whole) = (name.to_owned(), place(rest)..end);
        found.push(Parameter { name, value, place: begin..end, whole });
        rest = after.trim_start();
    }
    found
}

/// Splits off a value, with or without quotes, in which a backslash escapes the next character.
fn keyword_value(written: &str) -> Option<(String, &str)> {
    let (quoted, text) = match written.strip_prefix('\'') {
        Some(text) => (true, text),
        None => (false, written),
    };
    let (mut value, mut characters) = (String::new(), text.chars());
    loop {
        let before = characters.as_str();
        match characters.next() {
            Some('\'') if quoted => return Some((value, characters.as_str())),
            Some('\\') => value.extend(characters.next()),
            Some(c) if !quoted && c.is_whitespace() => return Some((value, before)),
            Some(c) => value.push(c),
            // A value without its closing quote is invalid.
            None => return (!quoted).then_some((value, "")),
        }
    }
}

/// Formats host and database, for errors.
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

/// Formats an error in one line: the beginning of the server's message, or the error with its causes.
pub fn describe(error: &tokio_postgres::Error) -> String {
    let Some(said) = error.as_db_error() else {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(deeper) = cause {
            // Writing into a String cannot fail.
            let _ = write!(text, ": {deeper}");
            cause = deeper.source();
        }
        return sanitized(text);
    };
    all_said(said.message(), said.code().code(), [said.detail(), said.hint()])
}

/// Joins the parts of a server's error into one line, hardly longer than [`QUOTED_BYTES_MAX`] in all.
fn all_said(message: &str, code: &str, more: [Option<&str>; 2]) -> String {
    let message = sanitized_within(message, QUOTED_BYTES_MAX / 2);
    let mut text = format!("{message} (SQLSTATE {})", sanitized_within(code, CODE_BYTES_MAX));
    for more in more.into_iter().flatten() {
        // Writing into a String cannot fail.
        let _ = write!(text, ": {}", sanitized_within(more, QUOTED_BYTES_MAX / 4));
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
                "postgres://h/d?sslrootcert=%2Fc%20a+1.pem",
                "sslrootcert",
                "/c a+1.pem",
                "postgres://h/d?",
            ),
            ("postgres://u:a?b@h/d?sslmode=require", "sslmode", "require", "postgres://u:a?b@h/d?"),
            ("host=h sslmode = 'require' dbname=d", "sslmode", "require", "host=h  dbname=d"),
            ("sslrootcert='my ca.pem'", "sslrootcert", "my ca.pem", ""),
            (r"sslrootcert='my \'ca\'.pem'", "sslrootcert", "my 'ca'.pem", ""),
            (r"sslrootcert=my\ ca.pem a=b", "sslrootcert", "my ca.pem", " a=b"),
        ] {
            let found = parameters(text).into_iter().find(|parameter| parameter.name == name);
            let found = found.expect(text);
            assert_eq!(found.value, value, "{text}");
            let mut without = text.to_owned();
            without.replace_range(found.whole, "");
            assert_eq!(without, rest, "{text}");
        }
        for text in [
            "postgres://sslmode=require@h/d",
            "host=sslmode",
            "xsslmode=require host=h",
            "password='a sslmode=require' host=h",
        ] {
            let found = parameters(text);
            assert!(found.iter().all(|parameter| parameter.name != "sslmode"), "{text}: {found:?}");
        }
    }

    #[test]
    fn wall_20_a_value_that_looks_like_a_parameter_stays_a_value() {
        let (config, roots) =
            read("host=h password='a sslmode=verify-full sslrootcert=b'").expect("a connection");
        assert_eq!(config.get_password(), Some(&b"a sslmode=verify-full sslrootcert=b"[..]));
        assert_eq!((config.get_ssl_mode(), roots), (SslMode::Prefer, None));

        let (config, roots) =
            read("sslmode=disable sslrootcert=a sslmode=verify-ca sslrootcert=b host=h")
                .expect("a connection");
        assert_eq!((config.get_ssl_mode(), roots.as_deref()), (SslMode::Require, Some("b")));
    }

    #[test]
    fn wall_20_an_at_of_a_parameter_makes_no_host() {
        for url in [
            "postgres://h/d?application_name=me@work",
            "postgres://u:p@h/d?application_name=me@work",
            "postgres://u:a@b@h/d",
        ] {
            let why = read(url).expect_err(url);
            assert!(why.contains("%40"), "{url}: {why}");
        }
        assert!(read("postgres://u:a?b/c@h/d?application_name=me%40work").is_ok());
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
            ("host=h sslmode=disable sslrootcert=/missing.pem", "off"),
        ] {
            let server = PostgresServer::parse(url).unwrap_or_else(|why| panic!("{url}: {why}"));
            let found = match server.encryption {
                Encryption::Required { .. } => "required",
                Encryption::Preferred(_) => "preferred",
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
    fn wall_18_with_a_root_certificate_the_server_is_always_verified() {
        let Ok(certificate) = std::env::var("SHARDMILL_TEST_POSTGRES_CERTIFICATE") else { return };
        for mode in ["", "prefer", "allow", "require", "verify-ca", "verify-full"] {
            let mode = if mode.is_empty() { String::new() } else { format!("sslmode={mode}") };
            for text in [
                format!("host=h {mode} sslrootcert='{certificate}'"),
                format!("host=h sslrootcert='{certificate}' {mode}"),
            ] {
                let server = PostgresServer::parse(&text);
                let server = server.unwrap_or_else(|why| panic!("{text}: {why}"));
                let Encryption::Required { roots, .. } = &server.encryption else {
                    panic!("{text}")
                };
                assert_eq!(roots.as_deref(), Some(certificate.as_str()), "{text}");
                assert_eq!(server.config.get_ssl_mode(), SslMode::Require, "{text}");
            }
        }
    }

    #[test]
    fn fault_25_the_schema_of_a_table_without_one_is_what_the_options_say() {
        for (options, schema) in [
            ("", None),
            ("-c statement_timeout=5", None),
            ("-csearch_path=x", Some("x")),
            ("-c search_path=X,public", Some("x")),
            ("--search_path=x", Some("x")),
            ("--search-path=x", Some("x")),
            (r#"-c search_path="$user",\ y"#, Some("y")),
            (r#"-c search_path="X""#, Some("X")),
            ("-c search_path=x -c search_path=y", Some("y")),
            ("-c work_mem=1 -c", None),
        ] {
            assert_eq!(first_schema(options).as_deref(), schema, "{options}");
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
    fn wall_02_what_a_server_says_is_one_line_of_bounded_length() {
        let long = "\nx".repeat(10 << 20);
        for (message, code, more, expected) in [
            ("no", "23505", [None, None], "no (SQLSTATE 23505)"),
            ("no", "23505", [Some("why"), Some("so")], "no (SQLSTATE 23505): why: so"),
            (
                "no\nerror: forged\r",
                "P0001",
                [None, None],
                "no\\nerror: forged\\r (SQLSTATE P0001)",
            ),
            ("no", "P0001", [Some("a\nb"), None], "no (SQLSTATE P0001): a\\nb"),
        ] {
            assert_eq!(all_said(message, code, more), expected);
        }
        let said = all_said(&long, &long, [Some(&long), Some(&long)]);
        assert!(
            said.len() < QUOTED_BYTES_MAX + 256 && !said.contains('\n'),
            "{} bytes",
            said.len()
        );
        assert_eq!(said.matches("… (20971520 bytes in all)").count(), 4, "{said}");
    }

    #[test]
    fn an_unreadable_string_shows_no_secret() {
        let error = PostgresServer::parse("postgres://u:secret@h:port/d").err().expect("no port");
        assert!(error.contains("invalid PostgreSQL") && !error.contains("secret"), "{error}");
    }
}
