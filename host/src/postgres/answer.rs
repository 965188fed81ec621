//! How long an answer of a server may be: the client keeps a message until it is whole, and the rows of most
//! queries until all are there, so that a server could fill the memory of the host.

use std::io;

use bytesize::ByteSize;

/// Bytes of one answer, up to the server's ReadyForQuery. A lookup takes 64 MiB of rows, which has the widest
/// answers; this is room for what surrounds them.
const ANSWER_BYTES_MAX: u64 = 128 << 20;
/// A message's type and its length, which counts itself. Source: PostgreSQL, "Message Formats".
const HEAD_BYTES: usize = 5;
/// ReadyForQuery: the end of an answer.
const READY: u8 = b'Z';
/// NoticeResponse: it comes at any time, as often as triggers please, and is not kept.
const NOTICE: u8 = b'N';

/// Adds up the messages of a server.
#[derive(Debug, Default)]
pub(super) struct AnswerLength {
    /// What was read of a message's head.
    head: [u8; HEAD_BYTES],
    head_bytes: usize,
    /// What is still to come of the message.
    rest: u64,
    answer_bytes: u64,
}

impl AnswerLength {
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
        let before = if kind == NOTICE { 0 } else { self.answer_bytes };
        let answer_bytes = before + 1 + length;
        if answer_bytes > ANSWER_BYTES_MAX {
            return Err(io::Error::other(format!(
                "expected an answer of at most {}, found one of {} or more: ask for less at a time",
                ByteSize(ANSWER_BYTES_MAX),
                ByteSize(answer_bytes)
            )));
        }
        match kind {
            READY => self.answer_bytes = 0,
            NOTICE => {}
            _ => self.answer_bytes = answer_bytes,
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
        let max = ANSWER_BYTES_MAX as usize;
        let half = whole(b'D', max / 2);
        let ready = whole(READY, 6);
        let one_more = message(b'D', 4, &[]);
        let cases: [(&str, Vec<Vec<u8>>, bool); 7] = [
            ("a head alone says too much", vec![message(b'D', u32::MAX, &[])], false),
            ("at the bound", vec![half.clone(), half.clone()], true),
            ("over it", vec![half.clone(), half.clone(), one_more.clone()], false),
            ("answers count alone", vec![half.clone(), ready, half.clone(), one_more], true),
            ("notices are not kept", vec![half.clone(), whole(NOTICE, max), half.clone()], true),
            ("but for one", vec![message(NOTICE, max as u32, &[])], false),
            ("no length", vec![message(b'D', 0, &[]), half], true),
        ];
        for (name, messages, is_taken) in cases {
            let bytes = messages.concat();
            for piece in [1 << 20, 7, bytes.len()] {
                if piece == 7 && bytes.len() > 1 << 20 {
                    continue;
                }
                let mut answer = AnswerLength::default();
                let taken: io::Result<()> =
                    bytes.chunks(piece).try_for_each(|piece| answer.add(piece));
                assert_eq!(taken.is_ok(), is_taken, "{name}, in pieces of {piece}");
            }
        }
    }

    #[test]
    fn heads_are_found_however_they_are_cut() {
        let bytes: Vec<u8> = (0..2_000).flat_map(|at| whole(b'D', 5 + at % 13)).collect();
        for piece in 1..40 {
            let mut answer = AnswerLength::default();
            for piece in bytes.chunks(piece) {
                answer.add(piece).expect("short");
            }
            assert_eq!(answer.answer_bytes, bytes.len() as u64, "in pieces of {piece}");
            assert_eq!((answer.rest, answer.head_bytes), (0, 0));
        }
    }
}
