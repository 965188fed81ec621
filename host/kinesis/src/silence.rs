//! HTTP client with a deadline for silence and bounds on answers. A call to a server that sends nothing for too long,
//! or too little, fails, and the retry uses new connections.
//!
//! Invariants:
//! - Every call ends, whatever the server does. The SDK's own timeouts do not give this: its read timeout ends with the
//!   first byte of an answer, its attempt timeout would also end long answers that make progress, and neither drops a
//!   dead connection, which the next call would share over HTTP/2.
//! - An answer that makes progress is never ended. Waiting uses up a patience of `silence_max`; each byte gives some of
//!   it back. So a silence ends the call, and so does one byte now and then.
//! - No answer uses more memory than is bounded for it. The SDK keeps an answer until it is whole (of a stream of
//!   events, a message), so lengths are bounded. What it parses may take fifty times the bytes (`{},{},…`), so the
//!   values in the JSON are counted too. An answer with a booking is not read beyond it (`booking`): its parts are
//!   gathered here and given to the SDK at once, since the SDK would keep them twice while it joins them.
//! - An answer of another process than the one that serves the embedded stream is never used.
//!
//! | what the server does | the call |
//! |---|---|
//! | no head of an answer within `silence_max`, plus the time for the upload | fails as a timeout; new connections |
//! | parts of an answer, but too slowly | fails; new connections |
//! | an answer longer than its bound, or with too many values | fails; new connections |
//! | an answer that needs more memory than is booked and free | is dropped by the reader (`booking`) |
//! | more than 16 informational heads | fails (`informational`) |
//! | the process of the embedded stream has ended | fails before it is sent, or before its answer is used |
//!
//! Races:
//! - Many calls wait on the same dead connection. The first one that fails renews the connections; the others see by
//!   the count `renewed` that this was done.
//! - The process of an embedded stream ends, and another user gets its port. So the process is looked up before each
//!   attempt and again when its answer has begun ([`Served::look`]). What remains: a request that is sent between the
//!   look and the end of the process may reach the new owner of the port. Its answer is refused.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use aws_sdk_kinesis::config::RuntimeComponents;
use aws_sdk_kinesis::config::http::HttpRequest;
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use bytesize::ByteSize;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::booking::{Booking, Need};
use super::informational::{self, TooManyHeads};
use crate::served::Served;
use shardmill_core::budget::{ANSWER_BYTES_MAX, ANSWER_VALUES_MAX, occupied_while_read};
use shardmill_core::private::FileMark;

/// Slowest upload: while a request is sent, the server is silent, so its bytes extend the deadline at this rate.
const UPLOAD_BYTES_PER_S: u64 = 256 << 10;

/// Slowest download: an answer at this rate never uses up its patience. The largest one, 10 MiB of payload, then takes
/// 14 minutes.
const DOWNLOAD_BYTES_PER_S: u32 = 16 << 10;
/// Most bytes of an error answer, or of one without records and shards. Nothing is booked for it, and all lanes may
/// have one at the same time. The largest one is of PutRecords, with a line for each of 500 records.
const OTHER_BYTES_MAX: u64 = 1 << 20;
/// Most bytes of a list of shards: some 400 for each of ten thousand. One list is read at a time.
const LIST_BYTES_MAX: u64 = 8 << 20;
/// Most bytes of one message of a stream of events. An event of SubscribeToShard has as much as an answer to
/// GetRecords.
const MESSAGE_BYTES_MAX: u64 = ANSWER_BYTES_MAX;
/// Bytes at the start of a message of a stream of events: the lengths of the message and of its headers, and a
/// checksum. The headers follow, then the payload, then a checksum of four bytes.
const HEAD_BYTES: usize = 12;
/// Media type of a stream of events. Source: Smithy, "Amazon Event Stream Specification".
const EVENT_STREAM: &str = "application/vnd.amazon.eventstream";

/// Makes the HTTP client of a server. Its calls fail when the server is silent for `silence_max`, or when `served` has
/// ended.
pub(super) fn http_client(silence_max: Duration, served: Option<Served>) -> SharedHttpClient {
    let process = served.as_ref().and_then(|served| served.look(None));
    let connections = RwLock::new(Connections { renewed: 0, process, client: connections() });
    SharedHttpClient::new(Deadlines { silence_max, served, connections: Arc::new(connections) })
}

/// Returns the most bytes of the answer to a call that succeeded; `target` is the header `x-amz-target` with its name.
fn bytes_max(target: &str) -> u64 {
    match target.rsplit('.').next() {
        Some("GetRecords") => ANSWER_BYTES_MAX,
        Some("ListShards") => LIST_BYTES_MAX,
        _ => OTHER_BYTES_MAX,
    }
}

/// Makes a client without connections.
fn connections() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .build_https()
}

/// Connections in use.
#[derive(Clone, Debug)]
struct Connections {
    /// Number of times that they were renewed.
    renewed: u64,
    /// Process at their other end, if the server is an embedded stream; `None`: the process has ended.
    process: Option<FileMark>,
    client: SharedHttpClient,
}

/// An HTTP client whose calls have a deadline.
#[derive(Clone, Debug)]
struct Deadlines {
    silence_max: Duration,
    /// Embedded stream that is the server.
    served: Option<Served>,
    connections: Arc<RwLock<Connections>>,
}

impl Deadlines {
    fn connections(&self) -> Connections {
        self.connections.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the connections to the process that serves now. Renews them if it is another one than before.
    fn current(&self) -> Connections {
        let connections = self.connections();
        let Some(served) = &self.served else { return connections };
        let process = served.look(connections.process);
        if process != connections.process {
            self.give_up(connections.renewed, process);
        }
        self.connections()
    }

    /// Makes calls from now on use new connections; to `process`, if the server is an embedded stream. Calls that are
    /// under way keep theirs. `of` is the count of the connections that failed.
    fn give_up(&self, of: u64, process: Option<FileMark>) {
        let mut connections = self.connections.write().unwrap_or_else(PoisonError::into_inner);
        // Many calls may have waited on the same connections: only the first one renews them.
        if connections.renewed == of {
            *connections = Connections { renewed: of + 1, process, client: self::connections() };
        }
    }
}

impl HttpClient for Deadlines {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        // The SDK calls this for each attempt, so a retry gets the connections of that time.
        let Connections { renewed, process, client } = self.current();
        let connector = client.http_connector(settings, components);
        let deadlines = self.clone();
        SharedHttpConnector::new(DeadlineConnector { deadlines, renewed, process, connector })
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.connections().client.connector_metadata()
    }
}

/// Sender of the requests of one attempt, over the connections of that time.
#[derive(Debug)]
struct DeadlineConnector {
    deadlines: Deadlines,
    renewed: u64,
    process: Option<FileMark>,
    connector: SharedHttpConnector,
}

impl DeadlineConnector {
    /// Returns the error of a call to an embedded stream that has ended.
    fn ended(&self) -> Option<ConnectorError> {
        let served = self.deadlines.served.as_ref()?;
        self.process.is_none().then(|| ConnectorError::io(Ended(served.clone()).into()))
    }
}

impl HttpConnector for DeadlineConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        if let Some(error) = self.ended() {
            return HttpConnectorFuture::ready(Err(error));
        }
        let (deadlines, renewed, process) = (self.deadlines.clone(), self.renewed, self.process);
        let silence_max = deadlines.silence_max;
        let upload_ms =
            request.body().content_length().unwrap_or_default() * 1_000 / UPLOAD_BYTES_PER_S;
        let wait_max = silence_max + Duration::from_millis(upload_ms);
        let most = bytes_max(request.headers().get("x-amz-target").unwrap_or_default());
        let (request, too_many) = match counted(request) {
            Ok(counted) => counted,
            Err(error) => return HttpConnectorFuture::ready(Err(error)),
        };
        let answer = self.connector.call(request);
        HttpConnectorFuture::new(async move {
            let answer = async {
                tokio::select! {
                    answer = answer => answer,
                    () = too_many.cancelled() => Err(ConnectorError::io(TooManyHeads.into())),
                }
            };
            let Ok(answer) = tokio::time::timeout(wait_max, answer).await else {
                deadlines.give_up(renewed, process);
                return Err(ConnectorError::timeout(Silence(wait_max).into()));
            };
            let mut answer = answer?;
            if let Some(served) = &deadlines.served {
                let now = served.look(process);
                if now != process {
                    // The answer may be of another user, who has the port now.
                    deadlines.give_up(renewed, now);
                    return Err(ConnectorError::io(Ended(served.clone()).into()));
                }
            }
            let is_stream = answer.headers().get("content-type") == Some(EVENT_STREAM);
            // An error answer is short and has no booking: the SDK's error keeps it while other calls are made.
            let is_well = answer.status().is_success();
            let booking = Booking::of_call().filter(|_| is_well && !is_stream);
            let bytes_max = if is_well { most } else { OTHER_BYTES_MAX };
            let length = answer.headers().get("content-length");
            let length = length.and_then(|length| length.parse().ok());
            let body = std::mem::replace(answer.body_mut(), SdkBody::taken());
            *answer.body_mut() = SdkBody::from_body_1_x(DeadlineBody {
                body,
                length: match is_stream {
                    true => Length::Events(Events::default()),
                    false => Length::Whole(Whole::new(bytes_max)),
                },
                booked: booking.map(|booking| Booked { booking, length, parts: Vec::new() }),
                patience: silence_max,
                deadline: Box::pin(tokio::time::sleep(silence_max)),
                waits_since: None,
                deadlines,
                renewed,
                process,
            });
            Ok(answer)
        })
    }
}

/// Returns the request, and a token that is cancelled when too many informational heads come before its answer.
fn counted(request: HttpRequest) -> Result<(HttpRequest, CancellationToken), ConnectorError> {
    let mut request =
        request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()))?;
    let too_many = informational::count(&mut request);
    let request =
        HttpRequest::try_from(request).map_err(|error| ConnectorError::user(error.into()))?;
    Ok((request, too_many))
}

/// Body of an answer, with a deadline for each part and a bound on its length.
struct DeadlineBody {
    body: SdkBody,
    length: Length,
    /// Parts of an answer with a booking, kept until it is whole.
    booked: Option<Booked>,
    /// Longest time to wait for the next part.
    patience: Duration,
    deadline: Pin<Box<Sleep>>,
    /// Start of the wait for the next part; `None`: nobody waits.
    waits_since: Option<Instant>,
    deadlines: Deadlines,
    renewed: u64,
    process: Option<FileMark>,
}

impl DeadlineBody {
    /// Counts a part that came. Only time spent waiting uses up patience: the reader may have been busy for long while
    /// the server was not silent.
    fn note(&mut self, part: &[u8]) -> Result<(), TooLong> {
        let silence_max = self.deadlines.silence_max;
        let waited = self.waits_since.take().map(|since| since.elapsed()).unwrap_or_default();
        let is_whole = self.length.add(part)?;
        let earned = Duration::from_secs(part.len() as u64).checked_div(DOWNLOAD_BYTES_PER_S);
        self.patience = match is_whole {
            true => silence_max,
            false => {
                (self.patience.saturating_sub(waited) + earned.unwrap_or_default()).min(silence_max)
            }
        };
        Ok(())
    }
}

impl Body for DeadlineBody {
    type Data = Bytes;
    type Error = aws_smithy_types::body::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        while let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            let part = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
            if let Err(error) = this.note(part.map_or(&[], |part| part)) {
                this.deadlines.give_up(this.renewed, this.process);
                if let Some(booked) = &this.booked {
                    booked.booking.is_too_long();
                }
                return Poll::Ready(Some(Err(error.into())));
            }
            let (Some(booked), Length::Whole(whole)) = (&mut this.booked, &this.length) else {
                // In a stream, each message has the booking of the call that waits for it.
                if let Length::Events(events) = &this.length
                    && Booking::of_call().is_some_and(|booking| !booking.covers(events.need()))
                {
                    return Poll::Pending;
                }
                return Poll::Ready(frame);
            };
            match frame {
                Some(Ok(frame)) => {
                    // Nothing reads trailers.
                    let Ok(part) = frame.into_data() else { continue };
                    if !booked.add(&part, whole) {
                        // The booking has woken the reader, which drops the call.
                        return Poll::Pending;
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    let all = std::mem::take(&mut booked.parts);
                    this.booked = None;
                    let all = (!all.is_empty()).then(|| Ok(Frame::data(Bytes::from(all))));
                    return Poll::Ready(all);
                }
            }
        }
        if this.waits_since.is_none() {
            let now = Instant::now();
            this.waits_since = Some(now);
            this.deadline.as_mut().reset(now + this.patience);
        }
        match this.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => {
                this.deadlines.give_up(this.renewed, this.process);
                Poll::Ready(Some(Err(Silence(this.deadlines.silence_max).into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.booked.is_none() && Body::is_end_stream(&self.body)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.booked {
            // The inner body does not know of the parts that are kept here.
            Some(_) => SizeHint::default(),
            None => Body::size_hint(&self.body),
        }
    }
}

/// An answer with a booking, as far as it came.
struct Booked {
    booking: Booking,
    /// Length of the answer, if the server says it at the start.
    length: Option<u64>,
    parts: Vec<u8>,
}

impl Booked {
    /// Adds a part; `whole` counts the answer with it. Returns false if the booking does not cover it.
    fn add(&mut self, part: &[u8], whole: &Whole) -> bool {
        if !self.booking.covers(need(whole, self.length)) {
            return false;
        }
        if let (true, Some(length)) = (self.parts.is_empty(), self.length) {
            // Reserved at once, since growing would copy the parts several times. The booking covers this length.
            let length = length.min(whole.bytes_max);
            self.parts.reserve_exact(usize::try_from(length).unwrap_or_default());
        }
        self.parts.extend_from_slice(part);
        true
    }
}

/// Returns the memory that an answer needs; `whole` counts what came, and `length` is its length if the server says it.
fn need(whole: &Whole, length: Option<u64>) -> Need {
    let (bytes, values) = (whole.bytes, whole.values.count);
    let by_now = occupied_while_read(bytes, values);
    let known = length.unwrap_or(bytes).clamp(bytes, whole.bytes_max);
    // Of an answer of unknown length, half may have come.
    let likely = length.unwrap_or(bytes * 2).clamp(bytes, whole.bytes_max);
    let likely_values = (values * likely / bytes.max(1)).min(ANSWER_VALUES_MAX);
    Need {
        by_now,
        known: occupied_while_read(known, values),
        likely: occupied_while_read(likely, likely_values),
    }
}

/// Count of what has come of an answer.
#[derive(Debug)]
enum Length {
    /// An answer that the SDK reads as a whole.
    Whole(Whole),
    /// A stream of events, which has no end.
    Events(Events),
}

impl Length {
    /// Adds a part. Returns whether a message of a stream ended in it: that is progress, however long it took.
    fn add(&mut self, part: &[u8]) -> Result<bool, TooLong> {
        match self {
            Self::Whole(whole) => whole.add(part).map(|()| false),
            Self::Events(events) => events.add(part),
        }
    }
}

/// Bytes and values of an answer that the SDK reads as a whole.
#[derive(Debug)]
struct Whole {
    bytes: u64,
    bytes_max: u64,
    values: JsonValues,
}

impl Whole {
    fn new(bytes_max: u64) -> Self {
        Self { bytes: 0, bytes_max, values: JsonValues::default() }
    }

    fn add(&mut self, part: &[u8]) -> Result<(), TooLong> {
        self.bytes += part.len() as u64;
        if self.bytes > self.bytes_max {
            return Err(TooLong::Bytes { bytes: self.bytes, bytes_max: self.bytes_max });
        }
        self.values.add(part)
    }
}

/// Count of the values in a JSON text that comes in parts: members and elements, by the commas and opening brackets
/// outside of strings.
#[derive(Debug, Default)]
struct JsonValues {
    count: u64,
    is_in_string: bool,
    /// Whether the next character of a string is escaped.
    is_escaped: bool,
}

impl JsonValues {
    fn add(&mut self, mut part: &[u8]) -> Result<(), TooLong> {
        if self.is_escaped && !part.is_empty() {
            (self.is_escaped, part) = (false, &part[1..]);
        }
        while !part.is_empty() {
            if self.is_in_string {
                let Some(at) = memchr::memchr2(b'"', b'\\', part) else { break };
                let is_escape = part[at] == b'\\';
                self.is_in_string = is_escape;
                // The backslash and the character after it, which may be in the next part.
                let taken = at + 1 + usize::from(is_escape);
                self.is_escaped = taken > part.len();
                part = part.get(taken..).unwrap_or_default();
            } else {
                let (text, rest) = match memchr::memchr(b'"', part) {
                    Some(at) => (&part[..at], &part[at + 1..]),
                    None => (part, &[][..]),
                };
                self.is_in_string = text.len() < part.len();
                let begins = |byte: &&u8| matches!(byte, b',' | b'{' | b'[');
                self.count += text.iter().filter(begins).count() as u64;
                if self.count > ANSWER_VALUES_MAX {
                    return Err(TooLong::Values);
                }
                part = rest;
            }
        }
        Ok(())
    }
}

/// Progress of a stream of events through its messages. Each begins with its length and that of its headers.
///
/// Source: Smithy, "Amazon Event Stream Specification".
#[derive(Debug, Default)]
struct Events {
    /// Bytes of the current message's head, as far as they came.
    head: [u8; HEAD_BYTES],
    head_bytes: usize,
    /// Bytes that have not come yet: of the message's headers, and of the whole message.
    headers: u64,
    rest: u64,
    /// Length of the message.
    message: u64,
    values: JsonValues,
}

impl Events {
    fn add(&mut self, mut part: &[u8]) -> Result<bool, TooLong> {
        let mut has_ended = false;
        while !part.is_empty() {
            if self.rest == 0 {
                let taken = part.len().min(HEAD_BYTES - self.head_bytes);
                self.head[self.head_bytes..][..taken].copy_from_slice(&part[..taken]);
                self.head_bytes += taken;
                part = &part[taken..];
                if self.head_bytes < HEAD_BYTES {
                    break;
                }
                self.begin()?;
            }
            let taken = part.len().min(usize::try_from(self.rest).unwrap_or(usize::MAX));
            let headers = taken.min(usize::try_from(self.headers).unwrap_or(usize::MAX));
            self.values.add(&part[headers..taken])?;
            self.headers -= headers as u64;
            self.rest -= taken as u64;
            part = &part[taken..];
            has_ended |= self.rest == 0;
        }
        Ok(has_ended)
    }

    /// Returns the memory for the message that came last.
    fn need(&self) -> Need {
        let bytes = occupied_while_read(self.message, self.values.count);
        Need { by_now: bytes, known: bytes, likely: bytes }
    }

    /// Begins a message whose head is complete.
    fn begin(&mut self) -> Result<(), TooLong> {
        let number = |at: usize| {
            let bytes = [self.head[at], self.head[at + 1], self.head[at + 2], self.head[at + 3]];
            u64::from(u32::from_be_bytes(bytes))
        };
        let (bytes, headers) = (number(0), number(4));
        if bytes > MESSAGE_BYTES_MAX {
            return Err(TooLong::Bytes { bytes, bytes_max: MESSAGE_BYTES_MAX });
        }
        // The SDK refuses lengths that contradict each other.
        (self.head_bytes, self.headers) = (0, headers);
        self.rest = bytes.saturating_sub(HEAD_BYTES as u64);
        self.message = bytes;
        self.values = JsonValues::default();
        Ok(())
    }
}

/// Error of an answer that is longer than its bound.
#[derive(Debug, PartialEq, Eq)]
enum TooLong {
    Bytes { bytes: u64, bytes_max: u64 },
    Values,
}

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes { bytes, bytes_max } => {
                let (bytes, bytes_max) = (ByteSize(*bytes), ByteSize(*bytes_max));
                write!(f, "expected an answer of at most {bytes_max}, found one of {bytes} or more")
            }
            Self::Values => {
                write!(f, "expected an answer of at most {ANSWER_VALUES_MAX} values, found more")
            }
        }
    }
}

impl std::error::Error for TooLong {}

/// Error of a server that was silent for this time.
#[derive(Debug)]
struct Silence(Duration);

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(silence) = self;
        write!(
            f,
            "the server sent nothing, or too little, for {}",
            humantime::format_duration(*silence)
        )
    }
}

impl std::error::Error for Silence {}

/// Error of an embedded stream whose process has ended.
#[derive(Debug)]
struct Ended(Served);

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.0.as_str();
        let port = self.0.port().unwrap_or_default();
        write!(
            f,
            "the embedded stream at {url} has ended; start it again with `shardmill stream serve --port {port}`"
        )
    }
}

impl std::error::Error for Ended {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a message of `bytes`, `headers` of which are headers, filled with `filler`.
    fn message(bytes: u32, headers: u32, filler: u8) -> Vec<u8> {
        let mut message = [bytes.to_be_bytes(), headers.to_be_bytes(), [0; 4]].concat();
        message.resize(bytes as usize, filler);
        message
    }

    #[test]
    fn wall_02_an_answer_of_kinesis_is_bounded_and_a_stream_of_events_by_its_messages() {
        for (target, expected) in [
            ("Kinesis_20131202.GetRecords", ANSWER_BYTES_MAX),
            ("Kinesis_20131202.ListShards", LIST_BYTES_MAX),
            ("Kinesis_20131202.GetShardIterator", OTHER_BYTES_MAX),
            ("", OTHER_BYTES_MAX),
        ] {
            let bytes_max = bytes_max(target);
            assert_eq!(bytes_max, expected, "{target}");
            let mut whole = Length::Whole(Whole::new(bytes_max));
            let part = vec![0; 1 << 20];
            for _ in 0..bytes_max >> 20 {
                assert_eq!(whole.add(&part), Ok(false));
            }
            let bytes = bytes_max + 1;
            assert_eq!(whole.add(&[0]), Err(TooLong::Bytes { bytes, bytes_max }));
        }

        let stream: Vec<u8> = (0..300).flat_map(|at| message(12 + at % 90, at % 7, b'{')).collect();
        for piece in 1..200 {
            let mut events = Length::Events(Events::default());
            let ended =
                stream.chunks(piece).filter(|part| events.add(part).expect("short")).count();
            assert!(ended > 0, "in pieces of {piece}");
            let Length::Events(events) = events else { panic!("events") };
            assert_eq!((events.rest, events.head_bytes), (0, 0), "in pieces of {piece}");
            assert_eq!(
                events.need().known,
                occupied_while_read(12 + 299 % 90, events.values.count)
            );
        }
        let mut events = Length::Events(Events::default());
        for _ in 0..100 {
            assert_eq!(events.add(&message(1 << 20, 9, 7)), Ok(true), "in all it has no bound");
        }
        let head = (MESSAGE_BYTES_MAX as u32 + 1).to_be_bytes();
        assert!(
            events.add(&[head, [0; 4], [0; 4]].concat()).is_err(),
            "none of it needs to have come"
        );
    }

    #[test]
    fn wall_02_what_an_answer_needs_is_known_by_its_length_or_guessed() {
        const KIB: u64 = 1 << 10;
        for (bytes, values, length, expected) in [
            (100 * KIB, 10, Some(KIB << 10), [(100 * KIB, 10), (KIB << 10, 10), (KIB << 10, 102)]),
            (100 * KIB, 10, None, [(100 * KIB, 10), (100 * KIB, 10), (200 * KIB, 20)]),
            // A length that a server reports may be wrong.
            (100 * KIB, 10, Some(1), [(100 * KIB, 10); 3]),
            (0, 0, Some(0), [(0, 0); 3]),
            (
                100 * KIB,
                60_000,
                Some(u64::MAX),
                [
                    (100 * KIB, 60_000),
                    (ANSWER_BYTES_MAX, 60_000),
                    (ANSWER_BYTES_MAX, ANSWER_VALUES_MAX),
                ],
            ),
        ] {
            let mut whole = Whole::new(ANSWER_BYTES_MAX);
            (whole.bytes, whole.values.count) = (bytes, values);
            let Need { by_now, known, likely } = need(&whole, length);
            let expected = expected.map(|(bytes, values)| occupied_while_read(bytes, values));
            assert_eq!([by_now, known, likely], expected, "{bytes} of {length:?}");
        }
    }

    #[test]
    fn wall_02_values_are_counted_outside_of_strings_however_the_text_is_cut() {
        let text = br#"{"Records":[{"Data":"a,{[\\","Key":"\"},{"},{},[1,2]],"Next":"x"}"#;
        for piece in 1..text.len() {
            let mut values = JsonValues::default();
            text.chunks(piece).for_each(|part| values.add(part).expect("few"));
            assert_eq!((values.count, values.is_in_string), (10, false), "in pieces of {piece}");
        }
        let mut whole = Length::Whole(Whole::new(OTHER_BYTES_MAX));
        let many = b"{},".repeat(ANSWER_VALUES_MAX as usize / 2);
        assert_eq!(whole.add(&many), Ok(false));
        assert_eq!(whole.add(b"{}"), Err(TooLong::Values));
        let mut events = Length::Events(Events::default());
        let bytes = ANSWER_VALUES_MAX as u32 + 1_000;
        assert_eq!(events.add(&message(bytes, bytes, b',')), Ok(true), "headers are not values");
        assert_eq!(events.add(&message(bytes, 0, b',')), Err(TooLong::Values));
    }
}
