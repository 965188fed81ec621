//! Records, the positions that name them, and batches of records.
//!
//! Pure data, no I/O. Positions compare as numbers, never as text. A range of positions is always half-open,
//! `(from, to]`: the first position is excluded, the last included. So ranges that follow each other join without a gap
//! and without an overlap, and a resume "after" a position never reads its record twice.

mod batch;
mod column;
mod digest;
mod excerpt;
mod memory;

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

pub use self::batch::{Batch, DeadLetterPlace, Entry, Record, Redrive, Row, RowRoute};
pub use self::column::{BoundRoute, Column};
pub use self::digest::Digest;
pub use self::excerpt::{excerpt, shortened};
pub use self::memory::{Arenas, CopyPlan, is_kept_whole};

/// Declares a newtype over text with the conversions that all domain names share.
macro_rules! text_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Wraps the text as it is.
            pub fn new(text: impl Into<Arc<str>>) -> Self {
                Self(text.into())
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self::new(text)
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.as_str().into()
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

text_newtype! {
    /// Name of a pipeline: part of the key of every position.
    PipelineName
}
text_newtype! {
    /// Id of a shard, such as `shardId-000000000003`.
    ShardId
}
text_newtype! {
    /// Name of a stage in its pipeline.
    StageName
}
text_newtype! {
    /// Name of a sink in its pipeline: part of the key of its positions.
    SinkName
}
text_newtype! {
    /// Name of a lookup in its pipeline, by which plugins ask for it.
    LookupName
}
text_newtype! {
    /// Name of a route that a plugin declares and a pipeline binds to sinks.
    RouteName
}

/// Kinesis sequence number: a decimal number of up to 129 digits.
///
/// Source: API reference, `Record.SequenceNumber`, pattern `0|([1-9]\d{0,128})`.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SequenceNumber(SmolStr);

/// Highest number of digits of a sequence number.
pub const SEQUENCE_NUMBER_DIGITS_MAX: usize = 129;

/// Error for text that is not a sequence number.
#[derive(Debug, thiserror::Error)]
#[error(
    "not a valid sequence number: {text:?}; expected 1 to {SEQUENCE_NUMBER_DIGITS_MAX} decimal digits"
)]
pub struct NotASequenceNumber {
    text: String,
}

impl SequenceNumber {
    /// Parses 1 to 129 decimal digits. Leading zeros are dropped, so that equal numbers compare as equal.
    pub fn parse(text: &str) -> Result<Self, NotASequenceNumber> {
        let digits = text.trim_start_matches('0');
        if text.is_empty()
            || digits.len() > SEQUENCE_NUMBER_DIGITS_MAX
            || !text.bytes().all(|byte| byte.is_ascii_digit())
        {
            return Err(NotASequenceNumber { text: text.into() });
        }
        Ok(Self(if digits.is_empty() { "0" } else { digits }.into()))
    }

    /// Returns the decimal digits, without leading zeros.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the number minus one; for 0 it returns 0.
    pub fn before(&self) -> Self {
        let mut digits = self.0.as_bytes().to_vec();
        for digit in digits.iter_mut().rev() {
            if *digit == b'0' {
                *digit = b'9';
            } else {
                *digit -= 1;
                let text: String = digits.iter().map(|digit| char::from(*digit)).collect();
                let text = text.trim_start_matches('0');
                return Self(if text.is_empty() { "0" } else { text }.into());
            }
        }
        Self("0".into())
    }

    /// Returns the number as 129 digits. Text order is then number order, for stores without wide numbers.
    pub fn zero_padded(&self) -> String {
        format!("{:0>width$}", &*self.0, width = SEQUENCE_NUMBER_DIGITS_MAX)
    }
}

impl From<u64> for SequenceNumber {
    fn from(number: u64) -> Self {
        Self(itoa::Buffer::new().format(number).into())
    }
}

impl Ord for SequenceNumber {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.0.len(), self.as_str()).cmp(&(other.0.len(), other.as_str()))
    }
}

impl PartialOrd for SequenceNumber {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for SequenceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SequenceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SequenceNumber {
    type Error = NotASequenceNumber;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<SequenceNumber> for String {
    fn from(number: SequenceNumber) -> Self {
        number.0.into()
    }
}

/// Range of a shard's hash keys, both ends inclusive: within 0 to 2^128 − 1, and never empty.
///
/// Source: API reference, `HashKeyRange`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HashRange {
    start: u128,
    end_inclusive: u128,
}

impl HashRange {
    /// Parses two decimal numbers. Returns `None` if one is not a hash key, or if the end is below the start.
    pub fn parse(start: &str, end_inclusive: &str) -> Option<Self> {
        let (start, end_inclusive) = (start.parse().ok()?, end_inclusive.parse().ok()?);
        (start <= end_inclusive).then_some(Self { start, end_inclusive })
    }

    /// Returns the first hash key.
    pub fn start(&self) -> u128 {
        self.start
    }

    /// Returns the last hash key.
    pub fn end_inclusive(&self) -> u128 {
        self.end_inclusive
    }

    /// Whether the range contains a hash key.
    pub fn contains(&self, hash_key: u128) -> bool {
        (self.start..=self.end_inclusive).contains(&hash_key)
    }

    /// Returns the first key of the upper half, for a split; `None` if the range has only one key.
    pub fn middle(&self) -> Option<u128> {
        let width = self.end_inclusive - self.start;
        (width > 0).then(|| self.start + width / 2 + 1)
    }

    /// Whether one range ends directly before the other begins.
    pub fn touches(&self, other: &Self) -> bool {
        self.end_inclusive.checked_add(1) == Some(other.start)
            || other.end_inclusive.checked_add(1) == Some(self.start)
    }
}

impl fmt::Display for HashRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.start, self.end_inclusive)
    }
}

/// Place of one record in its shard.
///
/// The sub-sequence counts the records inside one aggregated record; it is 0 for an ordinary record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Sequence number of the record.
    pub sequence: SequenceNumber,
    /// Index of the record in its aggregate, from 0.
    pub sub_sequence: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sub_sequence {
            0 => write!(f, "{}", self.sequence),
            sub => write!(f, "{}/{sub}", self.sequence),
        }
    }
}

/// Range of positions of a shard, `(from, to]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PositionRange {
    /// Excluded; `None`: the range begins before the first record that was read.
    pub from_exclusive: Option<Position>,
    /// Included.
    pub to_inclusive: Position,
}

/// A stream as the user names it: by its name, or by its ARN for a stream of another account.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StreamRef {
    /// Name of the stream.
    pub name: Arc<str>,
    /// ARN, if the user gave one; requests then carry it.
    pub arn: Option<Arc<str>>,
}

/// Error for text that names no stream.
#[derive(Debug, thiserror::Error)]
#[error(
    "not a valid stream: {text:?}; expected a name of 1 to 128 letters, digits, `_`, `.` and `-`, or an ARN \
     such as arn:aws:kinesis:eu-west-1:123456789012:stream/cars"
)]
pub struct NotAStream {
    text: String,
}

impl StreamRef {
    /// Parses a name or an ARN.
    ///
    /// Source: API reference, `StreamName` and `StreamARN`, pattern
    /// `arn:aws.*:kinesis:.*:\d{12}:stream/\S+`.
    ///
    /// # Errors
    /// [`NotAStream`].
    pub fn parse(text: &str) -> Result<Self, NotAStream> {
        let is_name = |name: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
            (1..=128).contains(&name.len()) && name.chars().all(allowed)
        };
        if is_name(text) {
            return Ok(Self { name: text.into(), arn: None });
        }
        match text.split(':').collect::<Vec<_>>()[..] {
            ["arn", partition, "kinesis", region, account, resource]
                if partition.starts_with("aws")
                    && !region.is_empty()
                    && account.len() == 12
                    && account.bytes().all(|byte| byte.is_ascii_digit()) =>
            {
                match resource.strip_prefix("stream/").filter(|name| is_name(name)) {
                    Some(name) => Ok(Self { name: name.into(), arn: Some(text.into()) }),
                    None => Err(NotAStream { text: text.into() }),
                }
            }
            _ => Err(NotAStream { text: text.into() }),
        }
    }

    /// Returns the name or the ARN for a request: exactly one of the two is set.
    pub fn name_or_arn(&self) -> (Option<String>, Option<String>) {
        match &self.arn {
            Some(arn) => (None, Some(arn.to_string())),
            None => (Some(self.name.to_string()), None),
        }
    }

    /// Returns the region in the ARN.
    pub fn region(&self) -> Option<&str> {
        self.arn.as_deref()?.split(':').nth(3)
    }
}

impl fmt::Display for StreamRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.arn.as_deref().unwrap_or(&self.name))
    }
}

/// Identity of a stream, which differs between two streams of the same name.
///
/// A stream that was deleted and created again has the same name and ARN, but another creation time. Positions of the
/// old stream mean nothing in the new one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StreamIdentity {
    /// Name of the stream.
    #[serde(with = "shared_text")]
    pub name: Arc<str>,
    /// ARN of the stream.
    #[serde(with = "shared_text")]
    pub arn: Arc<str>,
    /// Creation time, in milliseconds since 1970.
    pub created_ms: i64,
}

impl StreamIdentity {
    /// Returns the identity as one text, `ARN@milliseconds`. Positions are stored under this key.
    pub fn key(&self) -> String {
        format!("{}@{}", self.arn, self.created_ms)
    }

    /// Parses such a key; the name is the last part of the ARN. Returns `None` if the text is not such a key.
    pub fn of_key(key: &str) -> Option<Self> {
        let (arn, created_ms) = key.rsplit_once('@')?;
        let name = arn.rsplit_once('/').map_or(arn, |(_, name)| name);
        Some(Self { name: name.into(), arn: arn.into(), created_ms: created_ms.parse().ok()? })
    }
}

/// One shard as one pipeline reads it: the key of positions, claims and dead letters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ShardKey {
    /// Pipeline that reads.
    pub pipeline: PipelineName,
    /// Stream that is read.
    pub stream: Arc<StreamIdentity>,
    /// Shard of that stream.
    pub shard: ShardId,
}

/// Start of a shard's reading after it was resolved once: LATEST is a time by then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ShardStart {
    /// At the oldest record.
    #[default]
    Horizon,
    /// At the first record that arrived at or after this time, in milliseconds since 1970.
    AtMs(i64),
    /// At this record, inclusive.
    AtSequence(SequenceNumber),
}

impl ShardStart {
    /// Whether a record lies before the start.
    ///
    /// Some servers give arrival times in whole seconds. Such a time in the second of the start does not say on which
    /// side of the start the record lies. The record then does not count as before the start, so that none is skipped.
    pub fn is_after(&self, sequence: &SequenceNumber, arrived_ms: i64) -> bool {
        match self {
            Self::Horizon => false,
            Self::AtSequence(start) => sequence < start,
            Self::AtMs(start_ms) => {
                let is_whole_second = arrived_ms.rem_euclid(1_000) == 0;
                let start_of_second = start_ms - start_ms.rem_euclid(1_000);
                arrived_ms < if is_whole_second { start_of_second } else { *start_ms }
            }
        }
    }
}

/// Serializes shared text as a string.
mod shared_text {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(text: &Arc<str>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(from).map(Into::into)
    }
}

/// Id of the one shard of a redrive.
pub const REDRIVE_SHARD: &str = "redrive-000000000000";

/// Id of a replay: the time at which it began, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayId(pub i64);

impl std::fmt::Display for ReplayId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> SequenceNumber {
        SequenceNumber::parse(text).expect("a number")
    }

    #[test]
    fn sequence_numbers_compare_as_numbers() {
        assert!(number("9") < number("10"));
        assert!(number("99999999999999999999") < number("100000000000000000000"));
        assert_eq!(number("007"), number("7"));
        assert_eq!(number("0").as_str(), "0");
        assert!(number("9").zero_padded() < number("10").zero_padded());
        assert_eq!(number("1").zero_padded().len(), SEQUENCE_NUMBER_DIGITS_MAX);
    }

    #[test]
    fn hash_ranges_halve_and_touch_up_to_the_last_key() {
        let last = u128::MAX.to_string();
        let all = HashRange::parse("0", &last).expect("a range");
        let middle = all.middle().expect("a middle");
        assert_eq!(middle, 1 << 127);
        let low = HashRange::parse("0", &(middle - 1).to_string()).expect("a range");
        let high = HashRange::parse(&middle.to_string(), &last).expect("a range");
        assert!(low.touches(&high) && high.touches(&low) && !all.touches(&low));
        assert_eq!(HashRange::parse("7", "7").expect("a range").middle(), None);
        for (start, end) in [("", "1"), ("-1", "1"), ("2", "1"), ("0", "9".repeat(40).as_str())] {
            assert_eq!(HashRange::parse(start, end), None, "{start} {end}");
        }
    }

    #[test]
    fn a_stream_is_named_by_its_name_or_its_arn() {
        let arn = "arn:aws-cn:kinesis:cn-north-1:123456789012:stream/cars";
        let cars = StreamRef::parse(arn).expect("an ARN");
        assert_eq!((&*cars.name, cars.region()), ("cars", Some("cn-north-1")));
        assert_eq!(StreamRef::parse("cars").expect("a name").arn, None);
        for text in ["", "a b", "arn:aws:s3:::cars", &arn.replace("stream/", "")] {
            assert!(StreamRef::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_number_before_another() {
        for (number, before) in
            [("1", "0"), ("0", "0"), ("10", "9"), ("4200", "4199"), ("1000", "999")]
        {
            let number = SequenceNumber::parse(number).expect("a number");
            assert_eq!(number.before().as_str(), before);
        }
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for text in ["", "1a", "-1", "TRIM_HORIZON", &"9".repeat(130)] {
            assert!(SequenceNumber::parse(text).is_err(), "{text}");
        }
    }
}
