//! Connections to PostgreSQL use TLS if the server supports it, whatever makes the connection.

use std::path::Path;

use crate::sql_sinks::proxy::Proxy;
use crate::support::pipeline::PipelineToml;
use crate::support::{output, postgres, postgres_url, shardmill};

/// Warning about an unencrypted connection.
const PLAIN: &str = "the connection is not encrypted";

/// Returns the server's URL with parameters, such as a name by which its connections are found.
fn url(host: &str, port: u16, parameters: &str) -> String {
    let mut url = url::Url::parse(&postgres_url()).expect("a URL");
    url.set_host(Some(host)).expect("a host");
    url.set_port(Some(port)).expect("a port");
    url.set_query(Some(parameters).filter(|it| !it.is_empty()));
    url.into()
}

fn server() -> (String, u16) {
    let url = url::Url::parse(&postgres_url()).expect("a URL");
    (url.host_str().expect("a host").to_owned(), url.port().unwrap_or(5432))
}

/// Writes a pipeline with a table at `url`, and a row for it.
fn pipeline(folder: &Path, table: &str, url: &str) -> String {
    let rows = folder.join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1}\n").expect("written");
    PipelineToml::new(folder, "encrypted")
        .file(&rows, "format = \"application/json\"")
        .route_all_to(&["mart"])
        .sink("mart", &format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"{table}\""))
        .write()
}

/// Runs a pipeline with a table at `url`. The row records whether its connection is encrypted. Returns standard
/// error.
fn run(folder: &Path, table: &str, url: &str) -> String {
    let ran = output(&mut shardmill(&["run", &pipeline(folder, table, url)]));
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{url}: {said}");
    said
}

#[test]
fn wall_18_a_server_with_tls_is_spoken_to_by_tls() {
    let (host, port) = server();
    let certificate = std::env::var("SHARDMILL_TEST_POSTGRES_CERTIFICATE")
        .expect("SHARDMILL_TEST_POSTGRES_CERTIFICATE names the server's certificate: run `cargo xtask test`");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    // A server without TLS.
    let plain = runtime.block_on(Proxy::start(format!("{host}:{port}")));
    // 0.0.0.0 leads to this machine, but does not look like a loopback address.
    for (number, (host, port, parameters, encrypted, warned)) in [
        (host.as_str(), port, String::new(), true, false),
        (&host, port, "sslmode=prefer".into(), true, false),
        (&host, port, "sslmode=allow".into(), true, false),
        (&host, port, "sslmode=disable".into(), false, false),
        ("0.0.0.0", port, String::new(), true, false),
        ("0.0.0.0", port, "sslmode=disable".into(), false, false),
        (&host, plain.port, String::new(), false, false),
        ("0.0.0.0", plain.port, String::new(), false, true),
        (&host, port, format!("sslrootcert={certificate}"), true, false),
        (&host, port, format!("sslmode=prefer&sslrootcert={certificate}"), true, false),
        (&host, port, format!("sslrootcert={certificate}&sslmode=allow"), true, false),
        (&host, port, format!("sslmode=disable&sslrootcert={certificate}"), false, false),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = tempfile::tempdir().expect("a folder");
        let table = format!("wall_18_{}_{number}", std::process::id());
        postgres(&format!(
            "CREATE TABLE {table} (id int, encrypted boolean); \
             CREATE FUNCTION {table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             NEW.encrypted := (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()); \
             RETURN NEW; END $$; \
             CREATE TRIGGER notes BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION {table}()"
        ));
        let url = url(host, port, &parameters);
        let said = run(folder.path(), &table, &url);
        let found = postgres(&format!("SELECT encrypted::text FROM {table}"));
        assert_eq!(found, [encrypted.to_string()], "{url}: {said}");
        assert_eq!(said.contains(PLAIN), warned, "{url}: {said}");
        assert!(said.matches(PLAIN).count() <= 1, "it is said once: {said}");
        postgres(&format!("DROP TABLE {table}; DROP FUNCTION {table}"));
    }
}

#[test]
fn wall_18_with_a_root_certificate_nothing_goes_in_plain_text() {
    let (host, port) = server();
    let certificate = std::env::var("SHARDMILL_TEST_POSTGRES_CERTIFICATE")
        .expect("SHARDMILL_TEST_POSTGRES_CERTIFICATE names the server's certificate: run `cargo xtask test`");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    // A server without TLS.
    let plain = runtime.block_on(Proxy::start(format!("{host}:{port}")));
    let table = format!("wall_18_roots_{}", std::process::id());
    postgres(&format!("CREATE TABLE {table} (id int)"));
    for mode in ["", "sslmode=prefer&", "sslmode=allow&", "sslmode=require&"] {
        for (host, port, cause) in [
            // The certificate is for another name.
            ("0.0.0.0", port, "not valid for name"),
            (&host, plain.port, "server does not support TLS"),
        ] {
            let url = url(host, port, &format!("{mode}sslrootcert={certificate}"));
            let folder = tempfile::tempdir().expect("a folder");
            let pipeline = pipeline(folder.path(), &table, &url);
            let checked = output(&mut shardmill(&["check", &pipeline]));
            let said = [&checked.stdout[..], &checked.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(!checked.status.success(), "{url}: {said}");
            assert!(said.contains(cause), "{url}: {said}");
            assert!(said.contains("sslmode=disable"), "{url}: {said}");
            assert!(!said.contains(PLAIN), "{url}: {said}");
        }
    }
    postgres(&format!("DROP TABLE {table}"));
}
