//! Rows to an HTTP endpoint, many in one POST; at least once.
//!
//! Each request says what it holds, so that a receiver can tell what it has already:
//!
//! | header | what |
//! |---|---|
//! | `idempotency-key` | the same for the same rows of the same records, 32 hex digits |
//! | `shardmill-shard` | the stream and shard |
//! | `shardmill-first`, `shardmill-last` | the positions of the first and the last row's record |
//!
//! Positions of a shard only grow, but for what is sent again after a crash: a receiver that keeps
//! the last position per shard, and drops what lies at or before it, has each row once.

use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use sha2::{Digest as _, Sha256};

use super::line::{LineFormat, without_newlines};
use super::progress::Progress;
use super::{Acquired, BoundRoute, Commit, Committed, RefusalLog, Sink, SinkError, SinkWriter};
use crate::config::{HttpBody, HttpTarget};
use crate::http::{HttpGrant, Request};
use crate::record::{Position, Row, ShardKey, SinkName};

/// Hex digits of an idempotency key.
const KEY_DIGITS: usize = 32;
/// Characters of an answer that an error shows.
const ANSWER_CHARS: usize = 200;

/// An endpoint that rows are posted to.
pub struct HttpSink {
    shared: Arc<Shared>,
}

/// What the writers of all shards have in common.
struct Shared {
    sink: SinkName,
    target: HttpTarget,
    grant: HttpGrant,
}

impl HttpSink {
    /// A sink at an endpoint. Connects to nothing yet; connections live on the current runtime.
    ///
    /// # Errors
    /// When the machine's certificates cannot be read, or a header is none.
    pub fn new(name: SinkName, target: HttpTarget) -> Result<Self, SinkError> {
        let runtime = tokio::runtime::Handle::current();
        match HttpGrant::new(std::slice::from_ref(&target.host), runtime) {
            Ok(grant) => Ok(Self { shared: Arc::new(Shared { sink: name, target, grant }) }),
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
            progress: Progress::default(),
            sound: Arc::new([]),
            pieces: Vec::new(),
        };
        let writer = Box::new(writer);
        Ok(Acquired { writer, position: None, keeps_position: false, must_cut_at: None })
    }

    async fn position(&self, _shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        Ok(None)
    }
}

/// What an endpoint answered, as far as it matters.
enum Answer {
    Taken,
    /// The rows are at fault: fewer of them may be taken.
    Rejected(String),
}

struct HttpWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    progress: Progress,
    /// The rows of the commit under way that can be posted.
    sound: Arc<[usize]>,
    /// The requests that are still to be made, the next one last, as ranges of `sound`. A request
    /// that is tried again has the same rows, or its key would be another.
    pieces: Vec<Range<usize>>,
}

impl HttpWriter {
    /// Looks which rows can be posted.
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

    /// Posts what is still to be posted; what is rejected is halved until the row at fault is alone.
    async fn post_all(&mut self, rows: &Arc<Vec<Row>>) -> Result<(), SinkError> {
        while let Some(piece) = self.pieces.last().cloned() {
            let answer = match piece.is_empty() {
                true => Answer::Taken,
                false => self.post(rows, piece.clone()).await?,
            };
            self.pieces.pop();
            match (answer, piece.len()) {
                (Answer::Taken, _) => {
                    self.sound[piece].iter().for_each(|place| self.progress.done(*place));
                }
                (Answer::Rejected(reason), 1) => {
                    self.progress.refuse(self.sound[piece.start], reason);
                }
                (Answer::Rejected(_), length) => {
                    let middle = piece.start + length / 2;
                    self.pieces.push(middle..piece.end);
                    self.pieces.push(piece.start..middle);
                }
            }
        }
        Ok(())
    }

    async fn post(&self, rows: &Arc<Vec<Row>>, piece: Range<usize>) -> Result<Answer, SinkError> {
        let (shared, shard) = (Arc::clone(&self.shared), self.shard.clone());
        let (rows, places) = (Arc::clone(rows), Arc::clone(&self.sound));
        let posting = tokio::task::spawn_blocking(move || {
            let rows: Vec<&Row> = places[piece].iter().map(|place| &rows[*place]).collect();
            shared.post(&shard, &rows)
        });
        match posting.await {
            Ok(answer) => answer.map_err(|cause| self.shared.unavailable(cause)),
            Err(error) => Err(self.shared.unavailable(format!("posting was broken off: {error}"))),
        }
    }
}

impl Shared {
    /// One request, and what its answer means.
    fn post(&self, shard: &ShardKey, rows: &[&Row]) -> Result<Answer, String> {
        let url = &self.target.url;
        let deadline = Instant::now() + self.target.timeout;
        let request = Request {
            method: "POST".into(),
            url: url.to_string(),
            headers: self.headers(shard, rows),
            body: self.body(rows),
        };
        let answer = self.grant.send(request, deadline).map_err(|failure| failure.message)?;
        let said: String =
            String::from_utf8_lossy(&answer.body).chars().take(ANSWER_CHARS).collect();
        let status = answer.status;
        match status {
            200..=299 => Ok(Answer::Taken),
            // RFC 9110: the content is malformed, too large, of another type, or not processable.
            400 | 413 | 415 | 422 => Ok(Answer::Rejected(format!("answered {status}: {said}"))),
            401 | 403 => Err(format!(
                "{} answered {status}: {said}: set `headers` to what it lets in",
                place(url)
            )),
            _ => Err(format!("{} answered {status}: {said}", place(url))),
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

    /// The same for the same rows of the same records.
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
            // Known to be JSON.
            body.extend_from_slice(&without_newlines(&row.payload));
        }
        body.extend_from_slice(close);
        body
    }

    fn unavailable(&self, cause: String) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause }
    }
}

/// The endpoint without what could be a secret.
fn place(url: &url::Url) -> &str {
    url.host_str().unwrap_or("the endpoint")
}

#[async_trait]
impl SinkWriter for HttpWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        if self.progress.enter(commit) {
            self.sort_out(&commit.rows);
        }
        self.post_all(&commit.rows).await?;
        let refused = self.progress.refusals();
        if !refused.is_empty() {
            refusals.hold(commit, &refused).await?;
        }
        Ok(self.progress.committed(commit))
    }
}
