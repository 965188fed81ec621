//! The words of `plugin.wit` as Rust structures: the one description of their order in Rust,
//! compiled into the host and into the SDK.

/// A byte range of an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first byte.
    pub start: u32,
    /// The number of its bytes.
    pub length: u32,
}

impl Span {
    /// The words for "no span".
    pub const NONE: Span = Span { start: u32::MAX, length: 0 };

    /// An arena is below 4 GiB, so no span begins there: `NONE` is unambiguous.
    #[inline]
    fn or_none(self) -> Option<Self> {
        (self != Self::NONE).then_some(self)
    }
}

/// One record on its way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Input {
    /// The partition key.
    pub key: Span,
    /// The payload.
    pub payload: Span,
    /// The sequence number, in digits.
    pub sequence: Span,
    /// The position within an aggregated record, from 0.
    pub sub_sequence: u32,
    /// The route that it came by, an index into `context.upstream`.
    pub route: u32,
    /// When the stream took it, in milliseconds since the Unix epoch.
    pub arrived_ms: u64,
}

/// The words of an [`Input`].
pub type InputWords = [u32; 10];

impl Input {
    /// Reads the words.
    #[inline]
    pub fn from_words(words: &InputWords) -> Self {
        let [key, key_length, payload, payload_length, rest @ ..] = *words;
        let [sequence, sequence_length, sub_sequence, route, arrived_low, arrived_high] = rest;
        Self {
            key: Span { start: key, length: key_length },
            payload: Span { start: payload, length: payload_length },
            sequence: Span { start: sequence, length: sequence_length },
            sub_sequence,
            route,
            arrived_ms: u64::from(arrived_high) << 32 | u64::from(arrived_low),
        }
    }

    /// The words, in their order.
    #[inline]
    pub fn to_words(self) -> InputWords {
        let Self { key, payload, sequence, sub_sequence, route, arrived_ms } = self;
        [
            key.start,
            key.length,
            payload.start,
            payload.length,
            sequence.start,
            sequence.length,
            sub_sequence,
            route,
            arrived_ms as u32, // the low half
            (arrived_ms >> 32) as u32,
        ]
    }
}

/// One record on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// The record that it was made from, counted from 0.
    pub input: u32,
    /// Where it goes, an index into `descriptor.routes`.
    pub route: u32,
    /// The partition key. None: as it came in.
    pub key: Option<Span>,
    /// The payload. None: as it came in.
    pub payload: Option<Span>,
}

/// The words of an [`Output`].
pub type OutputWords = [u32; 6];

impl Output {
    /// Reads the words.
    #[inline]
    pub fn from_words(words: &OutputWords) -> Self {
        let [input, route, key, key_length, payload, payload_length] = *words;
        Self {
            input,
            route,
            key: Span { start: key, length: key_length }.or_none(),
            payload: Span { start: payload, length: payload_length }.or_none(),
        }
    }

    /// The words, in their order.
    #[inline]
    pub fn to_words(self) -> OutputWords {
        let key = self.key.unwrap_or(Span::NONE);
        let payload = self.payload.unwrap_or(Span::NONE);
        [self.input, self.route, key.start, key.length, payload.start, payload.length]
    }
}

/// One rejected record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// The record, counted from 0.
    pub input: u32,
    /// The reason.
    pub reason: Span,
}

/// The words of a [`Reject`].
pub type RejectWords = [u32; 3];

impl Reject {
    /// Reads the words.
    #[inline]
    pub fn from_words(words: &RejectWords) -> Self {
        let [input, start, length] = *words;
        Self { input, reason: Span { start, length } }
    }

    /// The words, in their order.
    #[inline]
    pub fn to_words(self) -> RejectWords {
        [self.input, self.reason.start, self.reason.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: Span = Span { start: 7, length: 8 };

    #[test]
    fn words_are_in_the_order_that_the_wit_says() {
        let input = Input {
            key: Span { start: 0, length: 1 },
            payload: Span { start: 2, length: 3 },
            sequence: Span { start: 4, length: 5 },
            sub_sequence: 6,
            route: 7,
            arrived_ms: 9 << 32 | 8,
        };
        assert_eq!(input.to_words(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(Input::from_words(&input.to_words()), input);
        let output = Output { input: 1, route: 2, key: None, payload: Some(SPAN) };
        assert_eq!(output.to_words(), [1, 2, u32::MAX, 0, 7, 8]);
        assert_eq!(Output::from_words(&output.to_words()), output);
        let reject = Reject { input: 1, reason: SPAN };
        assert_eq!(reject.to_words(), [1, 7, 8]);
        assert_eq!(Reject::from_words(&reject.to_words()), reject);
    }

    #[test]
    fn only_the_exact_words_are_none() {
        let odd = Span { start: u32::MAX, length: 1 };
        assert_eq!(odd.or_none(), Some(odd));
        assert_eq!(Span { start: 0, length: 0 }.or_none(), Some(Span { start: 0, length: 0 }));
    }
}
