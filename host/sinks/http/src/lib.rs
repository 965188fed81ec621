//! HTTP sink: posts rows to an endpoint, many in one request, at least once.
//!
//! Each request says what it has, so that a receiver can recognise rows that it already has:
//!
//! | header | value |
//! |---|---|
//! | `idempotency-key` | the same for the same rows of the same records, 32 hex digits |
//! | `shardmill-shard` | stream and shard |
//! | `shardmill-first`, `shardmill-last` | positions of the records of the first and the last row |
//!
//! Positions of a shard only grow, except when rows are sent again after a crash. So a receiver that keeps the last
//! position per shard, and drops rows at or before it, has each row once. One exception: after a status that refuses
//! rows, requests are halved, and the rows of one record may come in two requests with the same position.
//!
//! Only the status of an answer decides:
//!
//! | status | rows |
//! |---|---|
//! | 2xx except 207, after the whole request was sent | taken |
//! | 400, 413, 415, 422, and those in `refuse` | halved until the culprit is alone, which is refused |
//! | anything else, or no answer | wait, and are posted again; `Retry-After` is obeyed, up to 10 minutes |
//!
//! [`TYPE`] is the entry in the program's registry of sinks: `settings` reads `type = "http"`, lists its keys and makes
//! the sink.

mod settings;

use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sha2::{Digest as _, Sha256};

pub use self::settings::{HttpBody, HttpTarget, TYPE};
use shardmill_config::Values;
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{Position, Row, ShardKey, SinkName};
use shardmill_core::sink::{Acquired, Commit, Committed, RefusalLog, Sink, SinkError, SinkWriter};
use shardmill_net::{HttpGrant, HttpRequest, ResponseHead};
use shardmill_sinks_common::line::{LineFormat, without_newlines};
use shardmill_sinks_common::progress::CommitProgress;

/// Hex digits of an idempotency key.
const KEY_DIGITS: usize = 32;
/// Most characters of an answer that an error shows.
const ANSWER_CHARS: usize = 200;

/// Sink of an endpoint that rows are posted to.
pub struct HttpSink {
    shared: Arc<Shared>,
}

/// Parts that the writers of all shards share.
struct Shared {
    sink: SinkName,
    target: HttpTarget,
    grant: HttpGrant,
    values: Values,
}

impl HttpSink {
    /// Makes a sink at an endpoint. Connects to nothing yet; connections will use the current runtime. The text of
    /// answers is shown without any of the `values`.
    ///
    /// # Errors
    /// When the machine's certificates cannot be read, or a header is invalid.
    pub fn new(name: SinkName, target: HttpTarget, values: Values) -> Result<Self, SinkError> {
        let runtime = tokio::runtime::Handle::current();
        match HttpGrant::new(std::slice::from_ref(&target.host), runtime) {
            Ok(grant) => {
                Ok(Self { shared: Arc::new(Shared { sink: name, target, grant, values }) })
            }
            Err(error) => Err(SinkError::Unavailable { sink: name, cause: error.message }),
        }
    }
}

#[async_trait]
impl Sink for HttpSink {
    fn name(&self) -> &SinkName {
        &self.shared.sink
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        let is_json = |route: &&BoundRoute| {
            LineFormat::of_media_type(&route.format) == Some(LineFormat::Json)
        };
        match routes.iter().find(|route| !is_json(route)) {
            None => Ok(()),
            Some(route) => Err(self.shared.unavailable(format!(
                "route {} carries {}, an HTTP sink takes application/json: add a stage that makes \
                 JSON of it",
                route.name, route.format
            ))),
        }
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let writer = HttpWriter {
            shared: Arc::clone(&self.shared),
            shard: shard.clone(),
            progress: CommitProgress::default(),
            sound: Arc::new([]),
            pieces: Vec::new(),
            asked_to_wait: None,
        };
        let writer = Box::new(writer);
        Ok(Acquired { writer, position: None, keeps_position: false, must_cut_at: None })
    }

    async fn position(&self, _shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        Ok(None)
    }
}

/// Meaning of an answer.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The endpoint has the rows.
    Taken,
    /// The endpoint refuses the rows: fewer of them may be taken.
    Refused(String),
    /// The endpoint does not take rows now: they wait, with this cause.
    Unavailable(String),
}

struct HttpWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    progress: CommitProgress,
    /// Indexes of the rows of the current commit that can be posted.
    sound: Arc<[usize]>,
    /// Remaining requests, the next one last, as ranges of `sound`. A request that is tried again has the same rows, so
    /// that it has the same idempotency key.
    pieces: Vec<Range<usize>>,
    /// `Retry-After` of the last answer.
    asked_to_wait: Option<Duration>,
}

impl HttpWriter {
    /// Finds the rows that can be posted, and refuses the others.
    fn sort_out(&mut self, rows: &[Row]) {
        let mut sound = Vec::new();
        for place in self.progress.waiting() {
            match LineFormat::Json.line(&rows[place].payload) {
                Ok(_) => sound.push(place),
                Err(reason) => self.progress.refuse(place, reason),
            }
        }
        self.sound = sound.into();
        self.pieces.clear();
        self.pieces.push(0..self.sound.len());
    }

    /// Makes the remaining requests. Halves a request that is refused, until the culprit is alone.
    async fn post_all(&mut self, rows: &Arc<Vec<Row>>) -> Result<(), SinkError> {
        while let Some(piece) = self.pieces.last().cloned() {
            let outcome = match piece.is_empty() {
                true => Outcome::Taken,
                false => self.post(rows, piece.clone()).await?,
            };
            match outcome {
                // The piece stays: the retry posts it with the same rows.
                Outcome::Unavailable(cause) => return Err(self.shared.unavailable(cause)),
                Outcome::Taken => {
                    self.pieces.pop();
                    self.sound[piece].iter().for_each(|place| self.progress.done(*place));
                }
                Outcome::Refused(reason) => {
                    self.pieces.pop();
                    if piece.len() == 1 {
                        self.progress.refuse(self.sound[piece.start], reason);
                    } else {
                        let middle = piece.start + piece.len() / 2;
                        self.pieces.push(middle..piece.end);
                        self.pieces.push(piece.start..middle);
                    }
                }
            }
        }
        Ok(())
    }

    async fn post(
        &mut self,
        rows: &Arc<Vec<Row>>,
        piece: Range<usize>,
    ) -> Result<Outcome, SinkError> {
        let (shared, shard) = (Arc::clone(&self.shared), self.shard.clone());
        let (rows, places) = (Arc::clone(rows), Arc::clone(&self.sound));
        let building = tokio::task::spawn_blocking(move || {
            let rows: Vec<&Row> = places[piece].iter().map(|place| &rows[*place]).collect();
            shared.request(&shard, &rows)
        });
        let request = building.await.map_err(|error| {
            self.shared.unavailable(format!("making a request was interrupted: {error}"))
        })?;
        let deadline = Instant::now() + self.shared.target.timeout;
        let answer = self.shared.grant.deliver(request, deadline).await;
        let answer = answer.map_err(|failure| self.shared.unavailable(failure.message))?;
        let target = &self.shared.target;
        self.asked_to_wait = answer.retry_after;
        let answer = ResponseHead {
            location: answer.location.map(|location| self.shared.values.hide_beginning(location)),
            ..answer
        };
        let said = said(&answer.said, &self.shared.values);
        Ok(outcome(place(&target.url), &answer, &said, &target.refuse))
    }
}

/// Returns the meaning of an answer for the rows of its request. `refuse` has further statuses that refuse rows; `said`
/// is the beginning of the answer's body.
fn outcome(place: &str, answer: &ResponseHead, said: &str, refuse: &[u16]) -> Outcome {
    let status = answer.status;
    if refuse.contains(&status) {
        return Outcome::Refused(format!("answered {status}{said}"));
    }
    let hint = match status {
        // 207 (Multi-Status) has an outcome for each part, in a form that only the two sides know.
        207 => ": the outcome of each row is unknown; make the endpoint answer 200, or 4xx",
        200..=299 => return Outcome::Taken,
        // RFC 9110: the content is malformed, too large, of another type, or not processable.
        400 | 413 | 415 | 422 => return Outcome::Refused(format!("answered {status}{said}")),
        300..=399 => ": redirects are not followed; set `url` to the new location",
        401 | 403 => ": set `headers` to valid credentials",
        404 | 410 => ": set `url` to a path that accepts rows",
        405 => ": set `url` to a path that accepts POST",
        409 => ": if it means that rows are refused, add `refuse = [409]` to the sink",
        _ => "",
    };
    let location = match &answer.location {
        Some(location) => format!(" (Location: {})", one_line(location)),
        None => String::new(),
    };
    let wait = match answer.retry_after {
        Some(wait) => format!("; the endpoint asks to wait {} s (Retry-After)", wait.as_secs()),
        None => String::new(),
    };
    Outcome::Unavailable(format!("{place} answered {status}{location}{said}{hint}{wait}"))
}

/// Returns the beginning of a body, for a message. It may repeat the request, so values are hidden before it is cut: a
/// part of a value would not be found.
fn said(body: &[u8], values: &Values) -> String {
    let text = values.hide_beginning(String::from_utf8_lossy(body).into_owned());
    let text: String = text.chars().take(ANSWER_CHARS).collect();
    let text = one_line(&text);
    if text.is_empty() { text } else { format!(": {text}") }
}

/// Returns a text of the endpoint as one line without control characters.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ").trim().to_owned()
}

impl Shared {
    fn request(&self, shard: &ShardKey, rows: &[&Row]) -> HttpRequest {
        HttpRequest {
            method: "POST".into(),
            url: self.target.url.to_string(),
            headers: self.headers(shard, rows),
            body: self.body(rows),
        }
    }

    fn headers(&self, shard: &ShardKey, rows: &[&Row]) -> Vec<(String, String)> {
        let position = |row: Option<&&Row>| row.map(|row| row.position().to_string());
        let (first, last) = (position(rows.first()), position(rows.last()));
        let media_type = match self.target.body {
            HttpBody::Json => "application/json",
            HttpBody::Ndjson => "application/x-ndjson",
        };
        vec![
            ("content-type".into(), media_type.into()),
            ("idempotency-key".into(), self.idempotency_key(shard, rows)),
            ("shardmill-shard".into(), format!("{}/{}", shard.stream.name, shard.shard)),
            ("shardmill-first".into(), first.unwrap_or_default()),
            ("shardmill-last".into(), last.unwrap_or_default()),
        ]
    }

    /// Returns a key that is the same for the same rows of the same records.
    fn idempotency_key(&self, shard: &ShardKey, rows: &[&Row]) -> String {
        let mut hash = Sha256::new();
        let parts = [shard.pipeline.as_str(), self.sink.as_str(), &shard.stream.key()];
        for part in parts.into_iter().chain([shard.shard.as_str()]) {
            hash.update(part);
            hash.update([0]);
        }
        for row in rows {
            hash.update(row.position().to_string());
            hash.update(row.ordinal.to_be_bytes());
            hash.update(&row.payload);
            hash.update([0]);
        }
        let mut key = String::new();
        for byte in hash.finalize().iter().take(KEY_DIGITS / 2) {
            let _infallible = write!(key, "{byte:02x}");
        }
        key
    }

    fn body(&self, rows: &[&Row]) -> Vec<u8> {
        let (open, between, close): (&[u8], &[u8], &[u8]) = match self.target.body {
            HttpBody::Json => (b"[", b",", b"]"),
            HttpBody::Ndjson => (b"", b"\n", b"\n"),
        };
        let mut body = open.to_vec();
        for (index, row) in rows.iter().enumerate() {
            if index > 0 {
                body.extend_from_slice(between);
            }
            // The rows were checked to be JSON.
            body.extend_from_slice(&without_newlines(&row.payload));
        }
        body.extend_from_slice(close);
        body
    }

    fn unavailable(&self, cause: String) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause }
    }
}

/// Returns the endpoint's host, since the rest of the URL could be a secret.
fn place(url: &url::Url) -> &str {
    url.host_str().unwrap_or("the endpoint")
}

#[async_trait]
impl SinkWriter for HttpWriter {
    fn copies_rows(&self) -> bool {
        true
    }

    fn asked_to_wait(&self) -> Option<Duration> {
        self.asked_to_wait
    }

    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        self.asked_to_wait = None;
        if self.progress.enter(commit) {
            self.sort_out(&commit.rows);
        }
        self.post_all(&commit.rows).await?;
        let refused = self.progress.refusals();
        if !refused.is_empty() {
            refusals.record(commit, &refused).await?;
        }
        Ok(self.progress.committed(commit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16) -> ResponseHead {
        ResponseHead { status, location: None, retry_after: None, said: b"why\r\nso".to_vec() }
    }

    #[test]
    fn fault_27_the_status_decides() {
        let said = said(&answer(0).said, &Values::default());
        let at = |status| outcome("api.example", &answer(status), &said, &[409, 500]);
        for status in [200, 201, 202, 203, 204, 205, 206, 208, 226, 299] {
            assert_eq!(at(status), Outcome::Taken, "{status}");
        }
        for status in [400, 413, 415, 422, 409, 500] {
            assert_eq!(at(status), Outcome::Refused(format!("answered {status}: why  so")));
        }
        for status in
            [101, 207, 300, 301, 302, 304, 307, 308, 401, 403, 404, 405, 408, 410, 425, 429]
        {
            assert!(
                matches!(at(status), Outcome::Unavailable(cause) if cause.contains("why  so")),
                "{status}"
            );
        }
        for status in [501, 502, 503, 504, 511, 599, 999] {
            assert!(matches!(at(status), Outcome::Unavailable(_)), "{status}");
        }
    }

    #[test]
    fn wall_17_an_answer_that_repeats_a_value_is_hidden_before_it_is_cut() {
        let mut values = Values::default();
        values.add("KEY", "hunter2-secret");
        let text = format!("{}hunter2-secret", "x".repeat(ANSWER_CHARS - 8));
        let said = said(text.as_bytes(), &values);
        assert!(said.ends_with("x${KEY}") && !said.contains("hunter2"), "{said}");
    }

    #[test]
    fn fault_27_an_answer_for_later_says_where_it_points_to() {
        let moved = ResponseHead {
            location: Some("https://elsewhere.example/events".into()),
            retry_after: Some(Duration::from_secs(5)),
            ..answer(308)
        };
        let Outcome::Unavailable(cause) = outcome("api.example", &moved, "", &[]) else {
            panic!("taken")
        };
        for part in
            ["308", "Location: https://elsewhere.example/events", "`url`", "5 s (Retry-After)"]
        {
            assert!(cause.contains(part), "{cause}");
        }
    }
}
