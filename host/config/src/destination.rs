//! Where a sink's rows end up, as a text that two sinks share exactly when their rows do.
//!
//! It is kept in the state, so it holds no secret: no user, no password, and of an endpoint's path,
//! which may be a secret, only a digest.

use sha2::{Digest as _, Sha256};

use super::{Endpoint, HttpTarget, PostgresTarget, RedshiftTarget, SinkKind, StreamTarget};
use shardmill_pg::{PostgresServer, name};

/// Options of `object_store` that name another server.
const ENDPOINTS: [&str; 9] = [
    "aws_endpoint_url_s3",
    "aws_endpoint_url",
    "aws_endpoint",
    "azure_storage_endpoint",
    "azure_endpoint",
    "endpoint_url",
    "endpoint",
    "google_base_url",
    "base_url",
];
/// Hex digits that stand for a path.
const PATH_DIGITS: usize = 16;

/// The names under which a machine knows itself.
const OWN_HOSTS: [&str; 3] = ["127.0.0.1", "[::1]", "::1"];

/// The one spelling of a destination, of today's as of those that a state has kept: two that are one place are one text.
/// A second time it changes nothing.
pub fn one_spelling(destination: &str) -> String {
    let at_server = |place: &str| match url::Url::parse(place) {
        // The path of an endpoint may be a secret.
        Ok(url) if url.path() != "/" || url.query().is_some() => {
            format!("{} path {}", url.origin().ascii_serialization(), path_digits(&url))
        }
        _ => place.to_owned(),
    };
    match destination.split_once(' ') {
        Some(("postgres" | "redshift", rest)) => {
            let (server, table) = rest.split_once(" table ").unwrap_or((rest, ""));
            let (hosts, database) = server.split_once(' ').unwrap_or((server, ""));
            let hosts: Vec<String> = hosts.split(',').map(own_host).collect();
            let kind = destination.split(' ').next().unwrap_or_default();
            format!("{kind} {} {database} table {}", hosts.join(","), name::one_spelling(table))
        }
        Some(("kinesis" | "objects", _)) => {
            let (what, server) = match destination.rsplit_once(" at ") {
                Some((what, server)) => (what, format!(" at {}", at_server(server))),
                None => (destination, String::new()),
            };
            match what.strip_prefix("objects file://") {
                Some(folder) => format!("objects file://{}{server}", real_folder(folder)),
                None => format!("{what}{server}"),
            }
        }
        _ => destination.to_owned(),
    }
}

/// A host and its port; this machine has one name.
fn own_host(server: &str) -> String {
    let (host, port) = server.rsplit_once(':').unwrap_or((server, ""));
    match OWN_HOSTS.contains(&host) {
        true => format!("localhost:{port}"),
        false => server.to_owned(),
    }
}

/// A folder, by a path as a URL has it, without links: that part of it which is there.
fn real_folder(encoded: &str) -> String {
    let Some(path) =
        url::Url::parse(&format!("file://{encoded}")).ok().and_then(|url| url.to_file_path().ok())
    else {
        return encoded.to_owned();
    };
    let real = path.ancestors().find_map(|there| {
        let rest = path.strip_prefix(there).ok()?;
        Some(there.canonicalize().ok()?.join(rest))
    });
    let real = real.and_then(|real| url::Url::from_file_path(real).ok());
    real.map_or_else(|| encoded.to_owned(), |url| url.path().trim_end_matches('/').to_owned())
}

fn path_digits(url: &url::Url) -> String {
    let path = format!("{}?{}", url.path(), url.query().unwrap_or_default());
    hex::encode(Sha256::digest(path))[..PATH_DIGITS].to_owned()
}

impl SinkKind {
    /// Where the rows end up, in [`one_spelling`]; `None`: nowhere that lasts.
    pub fn destination(&self) -> Option<String> {
        self.written_destination().map(|destination| one_spelling(&destination))
    }

    fn written_destination(&self) -> Option<String> {
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
                let origin = url.origin().ascii_serialization();
                Some(format!("http {origin} path {}", path_digits(url)))
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

/// A table of a server; the user does not matter.
fn database(kind: &str, url: &str, table: &str) -> Option<String> {
    let server = PostgresServer::parse(url).ok()?;
    let table = match server.first_schema() {
        Some(schema) => name::in_schema(&schema, table),
        None => table.to_owned(),
    };
    Some(format!("{kind} {} table {table}", server.destination()))
}

#[cfg(test)]
mod tests {
    use crate::parse;

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
        let same = same.into_iter().chain([
            [
                "type = \"postgres\"\nurl = \"postgres://a@127.0.0.1/d\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"postgres://a@localhost/d\"\ntable = '\"t\"'",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d?options=-c%20search_path%3Dx,public\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"x.t\"",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d?options=-csearch_path=x\"\ntable = \"y.t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"y.t\"",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"public.t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = '\"public\".\"t\"'",
            ],
            [
                "type = \"redshift\"\nurl = \"postgres://a@db/d\"\ntable = \"s.t\"\nstaging = \"s3://b/p\"\niam_role = \"arn:aws:iam::1:role/r\"",
                "type = \"redshift\"\nurl = \"postgres://a@db/d\"\ntable = 's.\"t\"'\nstaging = \"s3://b/p\"\niam_role = \"arn:aws:iam::1:role/r\"",
            ],
        ]);
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
        for sink in [
            "type = \"kinesis\"\nstream = \"s\"\nendpoint = \"http://h:1/hunter2\"",
            "type = \"kinesis\"\nstream = \"s\"\nendpoint = \"http://h:1/?key=hunter2\"",
            "type = \"objects\"\nurl = \"s3://b/p\"\noptions = { endpoint = \"http://h:1/hunter2\" }",
        ] {
            let text = destination(sink).expect("a destination");
            assert!(text.contains("at http://h:1 path ") && !text.contains("hunter2"), "{text}");
            assert_eq!(super::one_spelling(&text), text);
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
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"a.t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = '\"a.t\"'",
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

    /// A destination that an older version wrote to the state equals the same destination of today.
    #[test]
    fn fault_25_a_kept_destination_has_todays_spelling() {
        for (kept, today) in [
            (
                "postgres 127.0.0.1:5432 database d table t",
                "postgres localhost:5432 database d table t",
            ),
            (
                "postgres ::1:5432,db:1 database d table \"t\"",
                "postgres localhost:5432,db:1 database d table t",
            ),
            (
                "postgres db:5432 database d table \"a.b\"",
                "postgres db:5432 database d table \"a.b\"",
            ),
            ("sqlite /m.db table t", "sqlite /m.db table t"),
            ("", ""),
        ] {
            assert_eq!(super::one_spelling(kept), today);
            assert_eq!(super::one_spelling(today), today, "a second time");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let real = folder.path().canonicalize().expect("a folder");
        std::os::unix::fs::symlink(&real, real.join("link")).expect("a link");
        let (real, link) = (real.join("new"), real.join("link/new"));
        let text = |path: &std::path::Path| format!("objects file://{}", path.display());
        assert_eq!(super::one_spelling(&text(&link)), text(&real));
    }
}
