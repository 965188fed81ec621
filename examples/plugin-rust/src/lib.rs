//! access-log: parses the log lines of web servers, in the common and the combined log format.
//!
//! | | |
//! |---|---|
//! | accepts | `text/plain` |
//! | route `requests` | `application/json`: one row per line |
//! | route `errors` | the same rows, if the status is 500 or higher |
//! | configuration | `ignore`: paths whose requests are dropped, such as health checks |

use serde::{Deserialize, Serialize};
use shardmill_sdk::{Context, Descriptor, Emitter, Error, Plugin, Record, Route};

/// Routes, in the order of their declaration.
const REQUESTS: u32 = 0;
const ERRORS: u32 = 1;

/// Type of the TOML table `[stage.config]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(default)]
    ignore: Vec<String>,
}

/// A parsed line, borrowed from its record.
#[derive(Serialize)]
struct Request<'a> {
    host: &'a str,
    user: Option<&'a str>,
    time: &'a str,
    method: &'a str,
    path: &'a str,
    status: u16,
    bytes: Option<u64>,
}

impl<'a> Request<'a> {
    /// Parses `HOST IDENT USER [TIME] "METHOD PATH PROTOCOL" STATUS BYTES …`.
    fn parse(line: &'a str) -> Result<Self, Error> {
        let missing = |what: &str| Error::reject(format!("expected {what} in {line:?}"));
        let mut words = line.splitn(4, ' ');
        let host = words.next().filter(|host| !host.is_empty()).ok_or_else(|| missing("a host"))?;
        let user = words.nth(1).ok_or_else(|| missing("a user"))?;
        let rest = words.next().and_then(|rest| rest.strip_prefix('['));
        let (time, rest) =
            rest.and_then(|rest| rest.split_once("] \"")).ok_or_else(|| missing("a [time]"))?;
        let (request, rest) = rest.split_once("\" ").ok_or_else(|| missing("a \"request\""))?;
        let (method, path) = request.split_once(' ').ok_or_else(|| missing("a method and a path"))?;
        let path = path.rsplit_once(" HTTP/").map_or(path, |(path, _)| path);
        let mut numbers = rest.split(' ');
        let status = numbers.next().and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| missing("a status"))?;
        let bytes = numbers.next().and_then(|bytes| bytes.parse().ok()); // `-`: none
        let user = Some(user).filter(|user| *user != "-");
        Ok(Self { host, user, time, method, path, status, bytes })
    }
}

struct AccessLog {
    ignore: Vec<String>,
}

impl Plugin for AccessLog {
    type Config = Config;

    fn configure(config: Config, _: &Context) -> Result<(Self, Descriptor), Error> {
        let rows = |name| {
            Route::new(name, "application/json")
                .column("host", "text")
                .nullable_column("user", "text")
                .column("time", "text")
                .column("method", "text")
                .column("path", "text")
                .column("status", "integer")
                .nullable_column("bytes", "bigint")
        };
        let descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .accepts("text/plain")
            .route(rows("requests"))
            .route(rows("errors"));
        Ok((AccessLog { ignore: config.ignore }, descriptor))
    }

    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        let request = Request::parse(std::str::from_utf8(record.payload())?)?;
        if self.ignore.iter().any(|path| path == request.path) {
            return Ok(()); // filtered
        }
        out.emit_json(REQUESTS, &request)?;
        if request.status >= 500 {
            out.emit_json(ERRORS, &request)?;
        }
        Ok(())
    }
}

shardmill_sdk::export!(AccessLog);
