//! Where a sink's rows end up, as a text that two sinks share exactly when their rows do.
//!
//! It is kept in the state, so it holds no secret: no user, no password, and of an endpoint's path,
//! which may be a secret, only a digest.

use sha2::{Digest as _, Sha256};

use super::{Endpoint, HttpTarget, PostgresTarget, RedshiftTarget, SinkKind, StreamTarget};
use crate::postgres::PostgresServer;

/// Options of `object_store` that name another server.
const ENDPOINTS: [&str; 4] = ["aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url"];
/// Hex digits that stand for a path.
const PATH_DIGITS: usize = 16;

impl SinkKind {
    /// Where the rows end up; `None`: nowhere that lasts.
    pub fn destination(&self) -> Option<String> {
        match self {
            Self::Discard | Self::Stdout { .. } => None,
            Self::Sqlite { path, table, .. } => {
                // The folder may be a link, and the file not there yet.
                let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
                let path = match (folder, path.file_name()) {
                    (Some(folder), Some(name)) => folder.join(name),
                    _ => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
                };
                let path = path.canonicalize().unwrap_or(path);
                // SQLite's names are the same in capitals.
                Some(format!("sqlite {} table {}", path.display(), table.to_ascii_lowercase()))
            }
            Self::Postgres(PostgresTarget { url, table, .. }) => database("postgres", url, table),
            Self::Redshift(RedshiftTarget { url, table, .. }) => database("redshift", url, table),
            Self::Objects { url, options, .. } => {
                let mut server = options
                    .iter()
                    .filter(|(key, _)| ENDPOINTS.contains(&key.to_ascii_lowercase().as_str()))
                    .map(|(_, value)| format!(" at {}", without_user(value)));
                let server = server.next().unwrap_or_default();
                let mut url = url.clone();
                // What a URL cannot carry, it does not.
                let _ = url.set_password(None);
                let _ = url.set_username("");
                url.set_query(None);
                Some(format!("objects {}{server}", url.as_str().trim_end_matches('/')))
            }
            Self::Kinesis(StreamTarget { stream, server, .. }) => {
                let place = match &server.endpoint {
                    Endpoint::Aws => format!("{:?}", server.region.as_deref().unwrap_or_default()),
                    Endpoint::Embedded => "embedded".to_owned(),
                    Endpoint::Url(url) => without_user(url.as_str()),
                };
                Some(format!("kinesis {stream} at {place}"))
            }
            Self::Http(HttpTarget { url, .. }) => {
                let path = format!("{}?{}", url.path(), url.query().unwrap_or_default());
                let digest = hex::encode(Sha256::digest(path));
                let origin = url.origin().ascii_serialization();
                Some(format!("http {origin} path {}", &digest[..PATH_DIGITS]))
            }
        }
    }
}

/// An endpoint's URL without a user and a password.
fn without_user(text: &str) -> String {
    let Ok(mut url) = url::Url::parse(text) else { return text.trim_end_matches('/').to_owned() };
    if url.username().is_empty() && url.password().is_none() {
        return text.trim_end_matches('/').to_owned();
    }
    // What a URL cannot carry, it does not.
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.as_str().trim_end_matches('/').to_owned()
}

/// A table of a server; the user does not matter, and `public` is where a table without a schema is.
fn database(kind: &str, url: &str, table: &str) -> Option<String> {
    let server = PostgresServer::parse(url).ok()?.destination();
    let table = table.strip_prefix("public.").unwrap_or(table);
    Some(format!("{kind} {server} table {table}"))
}

#[cfg(test)]
mod tests {
    use crate::config::parse;

    fn destination(sink: &str) -> Option<String> {
        let text = format!(
            "[pipeline]\nname = \"p\"\nstate_dir = \"s\"\n[source]\ntype = \"file\"\npath = \"-\"\n\
             [[stage]]\nname = \"r\"\nplugin = \"p.wasm\"\nroutes = {{ a = [\"a\"] }}\n\
             [[sink]]\nname = \"a\"\n{sink}"
        );
        let config = parse(std::path::Path::new("/w/p.toml"), text, &|_| None);
        config.unwrap_or_else(|error| panic!("{}", error.render(false))).sinks[0].kind.destination()
    }

    #[test]
    fn fault_25_one_destination_is_one_text_without_secrets() {
        let same = [
            [
                "type = \"postgres\"\nurl = \"postgres://a:hunter2@db:5432/d\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"host=DB user=b dbname=d\"\ntable = \"public.t\"",
            ],
            [
                "type = \"sqlite\"\npath = \"/nowhere/m.db\"\ntable = \"T\"",
                "type = \"sqlite\"\npath = \"/nowhere/m.db\"\ntable = \"t\"",
            ],
            [
                "type = \"objects\"\nurl = \"s3://b/p/\"",
                "type = \"objects\"\nurl = \"s3://b/p\"\nformat = \"raw\"",
            ],
            [
                "type = \"http\"\nurl = \"https://h/hook/hunter2\"",
                "type = \"http\"\nurl = \"https://h:443/hook/hunter2\"",
            ],
        ];
        for [one, two] in same {
            let text = destination(one).expect("a destination");
            assert_eq!(Some(&text), destination(two).as_ref());
            assert!(!text.contains("hunter2"), "{text}");
        }
        for sink in [
            "type = \"kinesis\"\nstream = \"s\"\nendpoint = \"http://a:hunter2@h:1\"",
            "type = \"objects\"\nurl = \"s3://b/p\"\noptions = { endpoint = \"http://a:hunter2@h:1\" }",
        ] {
            let text = destination(sink).expect("a destination");
            assert!(text.ends_with("at http://h:1") && !text.contains("hunter2"), "{text}");
        }
        let other = [
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/e\"\ntable = \"t\"",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db:6432/d\"\ntable = \"t\"",
            ],
            [
                "type = \"http\"\nurl = \"https://h/one\"",
                "type = \"http\"\nurl = \"https://h/two\"",
            ],
        ];
        for [one, two] in other {
            assert_ne!(destination(one), destination(two));
        }
        assert_eq!(destination("type = \"stdout\""), None);
    }
}
