//! What travels: records, the positions that name them, and batches of them.
//!
//! Pure data; no I/O. A position is compared as numbers, never as text, and travels in
//! half-open spans `(from, to]`.

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
    /// The name of a pipeline: part of every position's key.
    PipelineName
}
text_newtype! {
    /// A shard's id, as `shardId-000000000003`.
    ShardId
}
text_newtype! {
    /// The name of a stage in its pipeline.
    StageName
}
text_newtype! {
    /// The name of a sink in its pipeline: part of its positions' keys.
    SinkName
}
text_newtype! {
    /// The name of a lookup in its pipeline: what plugins ask for.
    LookupName
}
text_newtype! {
    /// The name of a route that a plugin declares and a pipeline binds to sinks.
    RouteName
}

/// A Kinesis sequence number: a decimal number of up to 129 digits.
///
/// Source: API reference, `Record.SequenceNumber`, pattern `0|([1-9]\d{0,128})`.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SequenceNumber(SmolStr);

/// The most digits that a sequence number has.
pub const SEQUENCE_NUMBER_DIGITS_MAX: usize = 129;

/// Text that is no sequence number.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is no sequence number: 1 to {SEQUENCE_NUMBER_DIGITS_MAX} decimal digits are due")]
pub struct NotASequenceNumber {
    text: String,
}

impl SequenceNumber {
    /// Reads 1 to 129 decimal digits; leading zeros are dropped, so that equal numbers are equal.
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

    /// The number's decimal digits, without leading zeros.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The number before this one; before 0 there is 0.
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

    /// The number as 129 digits: text order is then number order (for stores without wide numbers).
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

/// The hash keys of a shard, both ends inclusive: 0 to 2^128 − 1, and never empty.
///
/// Source: API reference, `HashKeyRange`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HashRange {
    start: u128,
    end_inclusive: u128,
}

impl HashRange {
    /// Reads two decimal numbers; `None` if one is no hash key, or the end is before the start.
    pub fn parse(start: &str, end_inclusive: &str) -> Option<Self> {
        let (start, end_inclusive) = (start.parse().ok()?, end_inclusive.parse().ok()?);
        (start <= end_inclusive).then_some(Self { start, end_inclusive })
    }

    /// The first hash key.
    pub fn start(&self) -> u128 {
        self.start
    }

    /// The last hash key.
    pub fn end_inclusive(&self) -> u128 {
        self.end_inclusive
    }

    /// Whether a hash key is in it.
    pub fn contains(&self, hash_key: u128) -> bool {
        (self.start..=self.end_inclusive).contains(&hash_key)
    }

    /// Where the second of two halves begins; `None` if there is one key only.
    pub fn middle(&self) -> Option<u128> {
        let width = self.end_inclusive - self.start;
        (width > 0).then(|| self.start + width / 2 + 1)
    }

    /// Whether one range ends just before the other begins.
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

/// The place of one record in its shard. The sub-sequence counts the records inside one
/// aggregated record; it is 0 for an ordinary one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The record's sequence number.
    pub sequence: SequenceNumber,
    /// The record's place within its aggregate, from 0.
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

/// A stretch of a shard, `(from, to]`. `from` of `None` is the place before the first record read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PositionRange {
    /// Exclusive; `None` is before everything.
    pub from_exclusive: Option<Position>,
    /// Inclusive.
    pub to_inclusive: Position,
}

/// What a user calls a stream: its name, or its ARN when it is another account's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StreamRef {
    /// The stream's name.
    pub name: Arc<str>,
    /// Its ARN, if that is how it was named; requests then carry it.
    pub arn: Option<Arc<str>>,
}

/// Text that names no stream.
#[derive(Debug, thiserror::Error)]
#[error(
    "{text:?} names no stream: due is a name of 1 to 128 letters, digits, `_`, `.` and `-`, or an ARN \
     such as arn:aws:kinesis:eu-west-1:123456789012:stream/cars"
)]
pub struct NotAStream {
    text: String,
}

impl StreamRef {
    /// Reads a name or an ARN.
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

    /// How requests name it: by name, or by ARN; exactly one of the two.
    pub fn name_or_arn(&self) -> (Option<String>, Option<String>) {
        match &self.arn {
            Some(arn) => (None, Some(arn.to_string())),
            None => (Some(self.name.to_string()), None),
        }
    }

    /// The region that the ARN names.
    pub fn region(&self) -> Option<&str> {
        self.arn.as_deref()?.split(':').nth(3)
    }
}

impl fmt::Display for StreamRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.arn.as_deref().unwrap_or(&self.name))
    }
}

/// A stream that cannot be mistaken for another of the same name: deleted and created again
/// under one name and ARN, it has another creation time.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StreamIdentity {
    /// The stream's name.
    #[serde(with = "shared_text")]
    pub name: Arc<str>,
    /// The stream's ARN.
    #[serde(with = "shared_text")]
    pub arn: Arc<str>,
    /// When it was created, in milliseconds since 1970.
    pub created_ms: i64,
}

impl StreamIdentity {
    /// The identity as one text, `ARN@milliseconds`: the form in which positions are keyed.
    pub fn key(&self) -> String {
        format!("{}@{}", self.arn, self.created_ms)
    }

    /// The identity of such a text; the name is the ARN's last part. `None`: it is none.
    pub fn of_key(key: &str) -> Option<Self> {
        let (arn, created_ms) = key.rsplit_once('@')?;
        let name = arn.rsplit_once('/').map_or(arn, |(_, name)| name);
        Some(Self { name: name.into(), arn: arn.into(), created_ms: created_ms.parse().ok()? })
    }
}

/// One shard as one pipeline reads it: what positions, claims and dead letters are keyed by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ShardKey {
    /// The pipeline that reads.
    pub pipeline: PipelineName,
    /// The stream that is read.
    pub stream: Arc<StreamIdentity>,
    /// The shard of that stream.
    pub shard: ShardId,
}

/// Where the reading of a shard began, resolved once: LATEST is a time by then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ShardStart {
    /// At the oldest record.
    #[default]
    Horizon,
    /// At the first record that arrived then or later, in milliseconds since 1970.
    AtMs(i64),
    /// At this record, inclusive.
    AtSequence(SequenceNumber),
}

impl ShardStart {
    /// Whether a record comes before the start. A server that knows arrival times by the second
    /// cannot tell within the second of the start: none of its records comes before it then.
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

/// Shared text in serde's terms: as a string.
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

/// The one shard of a redrive.
pub const REDRIVE_SHARD: &str = "redrive-000000000000";

/// A replay: when it was begun, in milliseconds since 1970.
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
