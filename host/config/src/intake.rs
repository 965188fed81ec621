//! `[intake]`: the HTTP port that receives events and puts them into the stream.

use toml::Spanned;
use toml::de::DeValue;
use url::Url;

use super::check::{CONNECTIONS_ALLOWED, Check};
use super::raw::{RawIntake, Text};
use super::shape::shaped;
use super::{IntakeConfig, SourceConfig, SourceKind};

/// Default size of a request: what one PutRecords call of the producer takes.
const BODY_BYTES: usize = 5 << 20;
const BODY_BYTES_MAX: usize = 1 << 30;
/// Default limit of the bytes that are on their way to the stream.
const IN_FLIGHT_BYTES: usize = 64 << 20;
const IN_FLIGHT_BYTES_MAX: usize = 64 << 30;
const BYTES_MIN: usize = 1 << 10;
/// Default number of connections: what a proxy in front keeps open.
const CONNECTIONS: usize = 1_024;

/// Reads `[intake]`, which needs a Kinesis stream as source.
pub(super) fn read(
    table: Spanned<DeValue<'_>>,
    source: Option<&SourceConfig>,
    check: &mut Check,
) -> Option<IntakeConfig> {
    let span = table.span();
    let raw: RawIntake = shaped(table, check)?;
    if source.is_some_and(|source| !matches!(source.kind, SourceKind::Kinesis(_))) {
        let help = "take the table out, or read a stream: [source] with type = \"kinesis\"";
        check.problem(span, "[intake] needs a Kinesis stream as source", help);
    }
    let why = "it does not authenticate clients, so only loopback is allowed; put a proxy in front";
    let listen = check.loopback(&raw.listen, "intake", "127.0.0.1:8080", why);
    let body = check.size(&raw.body, BODY_BYTES, BYTES_MIN..=BODY_BYTES_MAX);
    let in_flight = check.size(&raw.in_flight, IN_FLIGHT_BYTES, BYTES_MIN..=IN_FLIGHT_BYTES_MAX);
    let connections = check.count(&raw.connections, CONNECTIONS, CONNECTIONS_ALLOWED);
    let origins = origins(&raw.origins, check);
    let key = match &raw.key {
        Some(raw) => Some(check.filled(raw, "JSON member")?),
        None => None,
    };
    Some(IntakeConfig {
        listen: listen?,
        body_bytes_max: body?,
        in_flight_bytes_max: in_flight?,
        key_member: key,
        origins: origins?,
        connections_max: connections?,
    })
}

/// Reads the origins of pages, in the form that browsers send.
fn origins(raw: &[Spanned<Text>], check: &mut Check) -> Option<Vec<String>> {
    let mut origins = Vec::new();
    for text in raw {
        let written = &text.get_ref().0;
        let origin =
            Url::parse(written).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let origin = origin.map(|url| url.origin().ascii_serialization());
        match origin {
            // Browsers never send a path.
            Some(origin) if origin.eq_ignore_ascii_case(written.trim_end_matches('/')) => {
                origins.push(origin);
            }
            _ => {
                let message = format!("not a valid origin: {written:?}");
                let help = "write scheme and host, and the port if it is not the scheme's own: \
                            \"https://app.example.com\"";
                check.problem(text.span(), message, help);
            }
        }
    }
    (origins.len() == raw.len()).then_some(origins)
}
