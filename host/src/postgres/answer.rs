//! How long an answer of a server may be: the client keeps a message until it is whole, and the rows of most
//! queries until all are there, so that a server could fill the memory of the host. And how many statements the
//! client prepares for one call: to learn of a type that it does not know it prepares one more, and for a type in
//! the answer to that one the next, each of which lies deeper on the stack.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytesize::ByteSize;

/// Bytes of one answer, up to the server's ReadyForQuery. A lookup takes 64 MiB of rows, which has the widest
/// answers; this is room for what surrounds them.
const ANSWER_BYTES_MAX: u64 = 128 << 20;
/// Memory that the client needs for each message beside its bytes, at least: many small messages need many times
/// their bytes.
const MESSAGE_BYTES: u64 = 64;
/// The same of a setting that the server reports, which is kept by its name. A server reports some fifteen.
const SETTING_BYTES: u64 = 256;
/// Statements that the client may prepare in one call: its own, one for each kind of type, and for each type that it
/// does not know, with those that a type is made of.
const PREPARED_MAX: u32 = 64;
/// A message's type and its length, which counts itself. Source: PostgreSQL, "Message Formats".
const HEAD_BYTES: usize = 5;
/// ReadyForQuery: the end of an answer.
const READY: u8 = b'Z';
/// NoticeResponse: it comes at any time, as often as triggers please, and is not kept but while the client connects.
const NOTICE: u8 = b'N';
/// ParameterStatus.
const SETTING: u8 = b'S';
/// ParseComplete: a statement was prepared.
const PREPARED: u8 = b'1';

/// Statements that were prepared since the call began; its clones share the number.
#[derive(Clone, Debug, Default)]
pub(super) struct Prepared(Arc<AtomicU32>);

impl Prepared {
    /// Begins a call.
    pub(super) fn begin(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn add(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Adds up the messages of a server.
#[derive(Debug, Default)]
pub(super) struct AnswerLength {
    /// The bytes of the current message's head that were read.
    head: [u8; HEAD_BYTES],
    head_bytes: usize,
    /// Bytes of the message that have not been read.
    rest: u64,
    answer_bytes: u64,
    /// The client has connected: notices are not kept any more.
    is_ready: bool,
    prepared: Prepared,
}

impl AnswerLength {
    /// Of a connection whose calls begin at `prepared`.
    pub(super) fn new(prepared: Prepared) -> Self {
        Self { prepared, ..Self::default() }
    }

    /// Adds bytes that were read.
    ///
    /// # Errors
    /// That the answer is longer than it may be, by the length that a message says it has: none of it needs to
    /// have arrived.
    pub(super) fn add(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let skipped = bytes.len().min(usize::try_from(self.rest).unwrap_or(usize::MAX));
            self.rest -= skipped as u64;
            bytes = &bytes[skipped..];
            let taken = bytes.len().min(HEAD_BYTES - self.head_bytes);
            self.head[self.head_bytes..][..taken].copy_from_slice(&bytes[..taken]);
            self.head_bytes += taken;
            bytes = &bytes[taken..];
            if self.head_bytes == HEAD_BYTES {
                self.begin()?;
            }
        }
        Ok(())
    }

    /// Begins a message whose head is there.
    fn begin(&mut self) -> io::Result<()> {
        self.head_bytes = 0;
        let [kind, length @ ..] = self.head;
        let length = u64::from(u32::from_be_bytes(length));
        // A length that does not count itself is the client's to refuse.
        self.rest = length.saturating_sub(4);
        let is_kept = kind != NOTICE || !self.is_ready;
        let before = if is_kept { self.answer_bytes } else { 0 };
        let held = if kind == SETTING { SETTING_BYTES } else { MESSAGE_BYTES };
        let answer_bytes = before + held + length;
        if answer_bytes > ANSWER_BYTES_MAX {
            return Err(io::Error::other(format!(
                "expected an answer of at most {}, found one of {} or more: ask for less at a time",
                ByteSize(ANSWER_BYTES_MAX),
                ByteSize(answer_bytes)
            )));
        }
        if is_kept {
            self.answer_bytes = answer_bytes;
        }
        match kind {
            READY => (self.answer_bytes, self.is_ready) = (0, true),
            PREPARED if self.prepared.add() > PREPARED_MAX => {
                return Err(io::Error::other(format!(
                    "expected types that are made of fewer than {PREPARED_MAX} others, found a server that names \
                     one unknown type after the other"
                )));
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, length: u32, body: &[u8]) -> Vec<u8> {
        [&[kind][..], &length.to_be_bytes(), body].concat()
    }

    /// A message of `bytes` with its head.
    fn whole(kind: u8, bytes: usize) -> Vec<u8> {
        message(kind, bytes as u32 - 1, &vec![0; bytes - HEAD_BYTES])
    }

    #[test]
    fn wall_02_an_answer_of_postgresql_is_bounded_by_what_its_messages_say() {
        let max = (ANSWER_BYTES_MAX - 2 * MESSAGE_BYTES) as usize;
        let half = whole(b'D', max / 2);
        let ready = whole(READY, 6);
        let one_more = message(b'D', 8, &[0; 4]);
        let notices = whole(NOTICE, 9).repeat((ANSWER_BYTES_MAX / MESSAGE_BYTES) as usize);
        let settings = whole(SETTING, 9).repeat((ANSWER_BYTES_MAX / SETTING_BYTES) as usize);
        let cases: [(&str, Vec<Vec<u8>>, bool); 9] = [
            ("a head alone says too much", vec![message(b'D', u32::MAX, &[])], false),
            ("at the bound", vec![half.clone(), half.clone()], true),
            ("over it", vec![half.clone(), half.clone(), one_more.clone()], false),
            (
                "answers count alone",
                vec![half.clone(), ready.clone(), half.clone(), one_more],
                true,
            ),
            ("notices are kept while the client connects", vec![notices.clone()], false),
            ("and not after", vec![ready.clone(), half.clone(), notices, half.clone()], true),
            ("but for one", vec![ready, message(NOTICE, max as u32 + 100, &[])], false),
            ("settings are kept by name", vec![settings], false),
            ("no length", vec![message(b'D', 0, &[]), half], true),
        ];
        for (name, messages, is_taken) in cases {
            let bytes = messages.concat();
            for piece in [1 << 20, bytes.len()] {
                let mut answer = AnswerLength::default();
                let taken: io::Result<()> =
                    bytes.chunks(piece).try_for_each(|piece| answer.add(piece));
                assert_eq!(taken.is_ok(), is_taken, "{name}, in pieces of {piece}");
            }
        }
    }

    #[test]
    fn wall_02_a_server_that_names_unknown_types_without_end_is_given_up() {
        let prepared = Prepared::default();
        let mut answer = AnswerLength::new(prepared.clone());
        let one = whole(PREPARED, 5);
        for _ in 0..3 {
            prepared.begin();
            (0..PREPARED_MAX).for_each(|_| answer.add(&one).expect("few"));
        }
        assert!(answer.add(&one).is_err());
    }

    #[test]
    fn heads_are_found_however_they_are_cut() {
        let bytes: Vec<u8> = (0..2_000).flat_map(|at| whole(b'D', 5 + at % 13)).collect();
        let expected = bytes.len() as u64 + 2_000 * (MESSAGE_BYTES - 1);
        for piece in 1..40 {
            let mut answer = AnswerLength::default();
            for piece in bytes.chunks(piece) {
                answer.add(piece).expect("short");
            }
            assert_eq!(answer.answer_bytes, expected, "in pieces of {piece}");
            assert_eq!((answer.rest, answer.head_bytes), (0, 0));
        }
    }
}
