//! Text that identifies where the rows of a sink are stored. Two sinks have the same text exactly if their rows go to
//! the same place.
//!
//! The text is stored in the state, so it contains no secret: no user and no password, and only a digest of an
//! endpoint's path, which may be a secret.

use sha2::{Digest as _, Sha256};

use shardmill_pg::{PostgresServer, name};

/// Number of hex digits that represent a path.
const PATH_DIGITS: usize = 16;

/// Addresses of this machine that mean the same as `localhost`.
const OWN_HOSTS: [&str; 3] = ["127.0.0.1", "[::1]", "::1"];

/// Normalizes a destination, also one that an older version has stored, so that the same place always has the same
/// text. The function is idempotent.
///
/// It handles the types whose destinations older versions wrote in other spellings. A new type needs no case here,
/// because its spelling is unique from the start.
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

/// Normalizes a host and its port: all addresses of this machine become `localhost`.
fn own_host(server: &str) -> String {
    let (host, port) = server.rsplit_once(':').unwrap_or((server, ""));
    match OWN_HOSTS.contains(&host) {
        true => format!("localhost:{port}"),
        false => server.to_owned(),
    }
}

/// Resolves the links in a folder's path (which is encoded as in a URL), as far as the path exists.
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

/// Returns a digest of a URL's path and query, which may contain a secret.
pub fn path_digits(url: &url::Url) -> String {
    let path = format!("{}?{}", url.path(), url.query().unwrap_or_default());
    hex::encode(Sha256::digest(path))[..PATH_DIGITS].to_owned()
}

/// Returns an endpoint's URL without user and password.
pub fn without_user(text: &str) -> String {
    let Ok(mut url) = url::Url::parse(text) else { return text.trim_end_matches('/').to_owned() };
    if url.username().is_empty() && url.password().is_none() {
        return text.trim_end_matches('/').to_owned();
    }
    // Errors mean that the URL can have no user or password.
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.as_str().trim_end_matches('/').to_owned()
}

/// Returns the destination of a table on a server with PostgreSQL's protocol. The user does not matter. `kind` is the
/// type of the sink.
pub fn database(kind: &str, url: &str, table: &str) -> Option<String> {
    let server = PostgresServer::parse(url).ok()?;
    let table = match server.first_schema() {
        Some(schema) => name::in_schema(&schema, table),
        None => table.to_owned(),
    };
    Some(format!("{kind} {} table {table}", server.destination()))
}

#[cfg(test)]
mod tests {
    /// A destination that an older version has stored equals the same destination today.
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
