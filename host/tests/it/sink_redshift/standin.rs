//! A stand-in for Amazon Redshift: PostgreSQL behind a small proxy for its wire protocol, which loads from S3.
//!
//! It supports `COPY … FROM 's3://…' IAM_ROLE … MANIFEST GZIP FORMAT AS JSON 'auto' … MAXERROR n` with
//! `stl_load_errors`, `pg_last_copy_id()` and `pg_last_copy_count()`, has a type `super`, and refuses what Redshift
//! does not have. It differs from Redshift: it has no slices, its isolation is PostgreSQL's, and its types accept
//! what PostgreSQL's accept.

use std::io::Read as _;
use std::sync::Arc;

use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::sql_sinks::proxy::SSL_REQUEST;

/// The only role that may read the bucket.
pub const ROLE: &str = "arn:aws:iam::123456789012:role/Loader";

/// Words of PostgreSQL that Redshift does not support, in lower case.
const UNKNOWN: [&str; 14] = [
    "on conflict",
    "savepoint",
    "distinct on",
    "returning",
    "to_regclass",
    "is not distinct from",
    "set_config",
    "jsonb",
    "from stdin",
    "create index",
    "pg_temp",
    "ctid",
    "numeric(129",
    "truncate",
];

/// Statements that begin each session of the stand-in.
const SESSION: &str = "\
    SET client_min_messages = warning; SET search_path = public; \
    CREATE TEMP TABLE stl_load_errors (query bigint, filename text, line_number bigint, \
        colname text, err_reason text); \
    SET standin.copies = '0'; SET standin.loaded = '0'";

/// The same for Redshift Serverless, which shows load errors in another view.
const SERVERLESS_SESSION: &str = "\
    SET client_min_messages = warning; SET search_path = public; \
    CREATE TEMP TABLE sys_load_error_detail (query_id bigint, file_name text, line_number bigint, \
        column_name text, error_message text); \
    SET standin.copies = '0'; SET standin.loaded = '0'";

/// Objects that the stand-in's database has once. `super` accepts strings as long as Redshift's.
pub const DATABASE: &str = "\
    SELECT pg_advisory_lock(5439); \
    DO $$ BEGIN CREATE DOMAIN public.super AS jsonb CHECK (jsonb_typeof(VALUE) IS DISTINCT FROM \
        'string' OR length(VALUE #>> '{}') <= 65535); EXCEPTION WHEN duplicate_object THEN NULL; END $$; \
    CREATE OR REPLACE FUNCTION public.pg_last_copy_id() RETURNS bigint LANGUAGE sql AS \
        $$ SELECT current_setting('standin.copies')::bigint $$; \
    CREATE OR REPLACE FUNCTION public.pg_last_copy_count() RETURNS bigint LANGUAGE sql AS \
        $$ SELECT current_setting('standin.loaded')::bigint $$; \
    SELECT pg_advisory_unlock(5439)";

/// Differences of a stand-in from a provisioned cluster.
#[derive(Clone, Copy, Default)]
pub struct Kind {
    /// Whether it is Redshift Serverless.
    pub serverless: bool,
    /// Maximum number of rows that COPY leaves out, whatever the statement says.
    pub errors_max: Option<usize>,
}

/// Running stand-in; it ends with the test's runtime.
pub struct Standin {
    pub port: u16,
}

impl Standin {
    /// Listens on loopback in front of `server`, a `host:port` of PostgreSQL, and loads from a store.
    pub async fn start(server: String, store: Arc<dyn ObjectStore>, bucket: &'static str) -> Self {
        Self::start_as(server, store, bucket, Kind::default()).await
    }

    /// Like `start`, as another kind.
    pub async fn start_as(
        server: String,
        store: Arc<dyn ObjectStore>,
        bucket: &'static str,
        kind: Kind,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let backend = TcpStream::connect(&server).await.expect("the server");
                for socket in [&client, &backend] {
                    socket.set_nodelay(true).expect("a socket");
                }
                let (backend, store) = (Backend(backend), store.clone());
                let session = Session { client, backend, store, bucket, kind };
                // A client that disconnects looks like an error here.
                tokio::spawn(async move { drop(session.serve().await) });
            }
        });
        Self { port }
    }
}

/// A message: its tag and its body.
type Message = (u8, Vec<u8>);

async fn read_message(from: &mut TcpStream) -> std::io::Result<Message> {
    let tag = from.read_u8().await?;
    let mut body = vec![0; from.read_u32().await? as usize - 4];
    from.read_exact(&mut body).await?;
    Ok((tag, body))
}

async fn write_message(to: &mut TcpStream, (tag, body): &Message) -> std::io::Result<()> {
    let length = u32::try_from(body.len() + 4).expect("short");
    let message = [&[*tag][..], &length.to_be_bytes(), body].concat();
    to.write_all(&message).await
}

struct Backend(TcpStream);

impl Backend {
    /// Runs statements; returns their messages, up to ReadyForQuery.
    async fn ask(&mut self, sql: &str) -> std::io::Result<Vec<Message>> {
        let body = [sql.as_bytes(), b"\0"].concat();
        write_message(&mut self.0, &(b'Q', body)).await?;
        self.answer().await
    }

    async fn answer(&mut self) -> std::io::Result<Vec<Message>> {
        let mut messages = Vec::new();
        loop {
            let message = read_message(&mut self.0).await?;
            let is_last = message.0 == b'Z';
            messages.push(message);
            if is_last {
                return Ok(messages);
            }
        }
    }

    /// Runs a statement; returns the error, if it failed.
    async fn try_run(&mut self, sql: &str) -> std::io::Result<Option<String>> {
        let answer = self.ask(sql).await?;
        let error = answer.iter().find(|(tag, _)| *tag == b'E');
        Ok(error.map(|(_, body)| {
            let field = body.split(|byte| *byte == 0).find(|field| field.first() == Some(&b'M'));
            String::from_utf8_lossy(&field.expect("a message")[1..]).into_owned()
        }))
    }
}

struct Session {
    client: TcpStream,
    backend: Backend,
    store: Arc<dyn ObjectStore>,
    bucket: &'static str,
    kind: Kind,
}

impl Session {
    async fn serve(mut self) -> std::io::Result<()> {
        let (length, startup) = loop {
            let length = self.client.read_u32().await?;
            let mut startup = vec![0; length as usize - 4];
            self.client.read_exact(&mut startup).await?;
            if startup != SSL_REQUEST[4..] {
                break (length, startup);
            }
            self.client.write_all(b"N").await?;
        };
        self.backend.0.write_all(&[&length.to_be_bytes()[..], &startup].concat()).await?;
        let greeting = self.backend.answer().await?;
        let session = if self.kind.serverless { SERVERLESS_SESSION } else { SESSION };
        assert_eq!(self.backend.try_run(session).await?, None, "the session begins");
        for message in &greeting {
            write_message(&mut self.client, message).await?;
        }
        loop {
            let (tag, body) = read_message(&mut self.client).await?;
            match tag {
                b'X' => return Ok(()),
                b'Q' => {}
                other => {
                    panic!("expected the simple protocol, found {:?}", char::from(other))
                }
            }
            let sql = String::from_utf8_lossy(&body).trim_end_matches('\0').to_owned();
            let lower = sql.to_lowercase();
            let answer = match UNKNOWN.iter().find(|unknown| lower.contains(*unknown)) {
                Some(unknown) => self.fail(&format!("Redshift has no {unknown:?}: {sql}")).await?,
                None if lower.starts_with("copy ") => match self.copy(&sql).await? {
                    Ok(()) => self.backend.ask("SELECT 1 WHERE false").await?,
                    Err(why) => self.fail(&why).await?,
                },
                None => self.backend.ask(&sql).await?,
            };
            for message in &answer {
                write_message(&mut self.client, message).await?;
            }
        }
    }

    /// Makes the backend fail too, so that its transaction is aborted.
    async fn fail(&mut self, why: &str) -> std::io::Result<Vec<Message>> {
        let why = why.replace('\'', "''").replace('%', "%%");
        self.backend
            .ask(&format!("DO $standin$ BEGIN RAISE EXCEPTION '{why}'; END $standin$"))
            .await
    }

    /// Loads the files of a manifest. A file that fails as a whole is loaded row by row.
    async fn copy(&mut self, sql: &str) -> std::io::Result<Result<(), String>> {
        let (table, rest) = sql[5..].split_once(" FROM '").expect("COPY table FROM");
        let (manifest, options) = rest.split_once('\'').expect("a manifest");
        for expected in ["MANIFEST", "GZIP", "FORMAT AS JSON 'auto'", "MAXERROR"] {
            assert!(options.contains(expected), "{options}");
        }
        if !options.contains(&format!("IAM_ROLE '{ROLE}'")) {
            return Ok(Err("S3ServiceException:Access Denied,Status 403".into()));
        }
        let errors_max =
            options.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("MAXERROR n");
        let errors_max: usize = self.kind.errors_max.unwrap_or(errors_max);
        let manifest: serde_json::Value = match self.get(manifest).await {
            Ok(bytes) => serde_json::from_slice(&bytes).expect("a manifest is JSON"),
            Err(why) => return Ok(Err(why)),
        };
        self.backend
            .ask("SELECT set_config('standin.copies', (pg_last_copy_id() + 1)::text, false)")
            .await?;
        let (mut loaded, mut errors) = (0, 0);
        for entry in manifest["entries"].as_array().expect("entries") {
            assert_eq!(entry["mandatory"], true, "the manifest must require its files");
            let url = entry["url"].as_str().expect("a URL");
            let bytes = match self.get(url).await {
                Ok(bytes) => bytes,
                Err(why) => return Ok(Err(why)),
            };
            let mut text = String::new();
            let mut gzip = flate2::read::MultiGzDecoder::new(&bytes[..]);
            gzip.read_to_string(&mut text).expect("gzip of UTF-8");
            let lines: Vec<&str> = text.lines().collect();
            if self.insert(table, &lines).await?.is_none() {
                loaded += lines.len();
                continue;
            }
            for (line, number) in lines.iter().zip(1..) {
                match self.insert(table, &[line]).await? {
                    None => loaded += 1,
                    Some(why) => {
                        errors += 1;
                        let why = why.replace('\'', "''");
                        let errors = match self.kind.serverless {
                            true => "sys_load_error_detail",
                            false => "stl_load_errors",
                        };
                        let note = format!(
                            "INSERT INTO {errors} VALUES \
                             (pg_last_copy_id(), '{url}  ', {number}, 'any', '{why}')"
                        );
                        assert_eq!(self.backend.try_run(&note).await?, None);
                    }
                }
            }
        }
        self.backend.ask(&format!("SET standin.loaded = '{loaded}'")).await?;
        let failed = errors > errors_max;
        if failed {
            // Removes what a failed COPY has loaded.
            self.backend.ask(&format!("DELETE FROM {table}")).await?;
        }
        Ok(if failed { Err("Load failed. Check 'stl_load_errors'".into()) } else { Ok(()) })
    }

    async fn insert(&mut self, table: &str, lines: &[&str]) -> std::io::Result<Option<String>> {
        let rows = lines.join(",").replace('\'', "''");
        self.backend
            .try_run(&format!(
                "INSERT INTO {table} SELECT * FROM json_populate_recordset(NULL::{table}, '[{rows}]')"
            ))
            .await
    }

    async fn get(&self, url: &str) -> Result<bytes::Bytes, String> {
        let key = url.strip_prefix(&format!("s3://{}/", self.bucket)).expect("a key of the bucket");
        let path = Path::parse(key).expect("a key");
        let missing = |_| format!("The specified S3 prefix '{key}' does not exist");
        let found = self.store.get(&path).await.map_err(missing)?;
        found.bytes().await.map_err(|error| error.to_string())
    }
}
