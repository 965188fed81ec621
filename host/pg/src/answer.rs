//! Limits on the answers of a server, which could otherwise exhaust the memory of the host.
//!
//! - The client keeps a message until it is complete, and the rows of most queries until all have arrived. So the bytes
//!   of an answer are limited.
//! - To learn about an unknown type, the client prepares one more statement; for an unknown type in the answer to that
//!   one it prepares another, each deeper on the stack. So the number of prepared statements per call is limited.
//! - The client keeps every setting that the server reports for the life of the connection. So the bytes of the
//!   settings are limited.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytesize::ByteSize;

/// Limit of one answer, up to the server's ReadyForQuery, in bytes. The largest answers are those of lookups, with at
/// most 64 MiB of rows; the rest is room for what surrounds them.
const ANSWER_BYTES_MAX: u64 = 128 << 20;
/// Lower limit of the memory that the client needs for each message besides its bytes. Many small messages need many
/// times their bytes.
const MESSAGE_BYTES: u64 = 64;
/// The same for a setting that the server reports, which is kept by its name. A server reports about fifteen.
const SETTING_BYTES: u64 = 256;
/// Limit of all settings that the server reports, in bytes. The client keeps them while the connection lives. Usual
/// servers need some hundred bytes.
const SETTINGS_BYTES_MAX: u64 = 1 << 20;
/// Limit of the statements that the client may prepare in one call: its own one, one for each kind of type, and those
/// for each unknown type and the types that it consists of.
const PREPARED_MAX: u32 = 64;
/// Bytes of a message's type and length; the length counts itself. Source: PostgreSQL, "Message Formats".
const HEAD_BYTES: usize = 5;
/// ReadyForQuery: the end of an answer.
const READY: u8 = b'Z';
/// NoticeResponse: it can come at any time and any number of times (triggers send them). The client keeps it only while
/// it connects.
const NOTICE: u8 = b'N';
/// ParameterStatus.
const SETTING: u8 = b'S';
/// ParseComplete: a statement was prepared.
const PREPARED: u8 = b'1';

/// Number of statements that were prepared since the call began. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Prepared(Arc<AtomicU32>);

impl Prepared {
    /// Starts a call.
    pub(super) fn begin(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn add(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Counts the messages of a server.
#[derive(Debug, Default)]
pub(super) struct AnswerLength {
    /// Bytes of the current message's head that were read.
    head: [u8; HEAD_BYTES],
    head_bytes: usize,
    /// Bytes of the message that were not read yet.
    rest: u64,
    answer_bytes: u64,
    /// Whether the client has connected. From then on it drops notices.
    is_ready: bool,
    prepared: Prepared,
    settings: Settings,
}

impl AnswerLength {
    /// Makes the counter of a connection; `prepared` is reset when a call begins.
    pub(super) fn new(prepared: Prepared) -> Self {
        Self { prepared, ..Self::default() }
    }

    /// Counts bytes that were read.
    ///
    /// # Errors
    /// The answer exceeds the limit. The length in the head of a message is enough to know; none of its bytes needs to
    /// have arrived.
    pub(super) fn add(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let skipped = bytes.len().min(usize::try_from(self.rest).unwrap_or(usize::MAX));
            self.rest -= skipped as u64;
            self.settings.read(&bytes[..skipped]);
            if self.rest == 0 {
                self.settings.end_message()?;
            }
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

    /// Starts a message whose head is complete.
    fn begin(&mut self) -> io::Result<()> {
        self.head_bytes = 0;
        let [kind, length @ ..] = self.head;
        let length = u64::from(u32::from_be_bytes(length));
        // A length that is too small to count itself is invalid: the client refuses it.
        self.rest = length.saturating_sub(4);
        let is_kept = kind != NOTICE || !self.is_ready;
        let before = if is_kept { self.answer_bytes } else { 0 };
        let occupied = if kind == SETTING { SETTING_BYTES } else { MESSAGE_BYTES };
        let answer_bytes = before + occupied + length;
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
            SETTING => self.settings.begin_message(self.rest)?,
            READY => (self.answer_bytes, self.is_ready) = (0, true),
            PREPARED if self.prepared.add() > PREPARED_MAX => {
                return Err(io::Error::other(format!(
                    "expected types that depend on fewer than {PREPARED_MAX} others, found a server that names \
                     one unknown type after the other"
                )));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Memory of the client for the settings that a server has reported since the connection began. A setting may be
/// reported many times, whenever a transaction changes it; only the last report counts.
#[derive(Debug, Default)]
struct Settings {
    /// Bytes of each setting, by its name.
    occupied: HashMap<Vec<u8>, u64>,
    occupied_bytes: u64,
    /// Report that is being read.
    current: Option<Report>,
}

/// Report of a setting: its name, a zero, its value, a zero.
#[derive(Debug)]
struct Report {
    /// Part of the name that was read.
    name: Vec<u8>,
    is_name_whole: bool,
    /// Bytes of name and value.
    bytes: u64,
}

impl Settings {
    /// Starts a report of this length.
    fn begin_message(&mut self, bytes: u64) -> io::Result<()> {
        Self::check(SETTING_BYTES + bytes)?;
        self.current = Some(Report { name: Vec::new(), is_name_whole: false, bytes });
        // A report without a name is invalid: the client refuses it.
        if bytes == 0 { self.end_message() } else { Ok(()) }
    }

    /// Reads a part of the current message, if it is a report.
    fn read(&mut self, part: &[u8]) {
        let Some(report) = self.current.as_mut().filter(|report| !report.is_name_whole) else {
            return;
        };
        let end = memchr::memchr(0, part);
        report.is_name_whole = end.is_some();
        report.name.extend_from_slice(&part[..end.unwrap_or(part.len())]);
    }

    /// Ends the current message.
    fn end_message(&mut self) -> io::Result<()> {
        let Some(Report { name, bytes, .. }) = self.current.take() else { return Ok(()) };
        let occupied = SETTING_BYTES + bytes;
        let before = self.occupied.insert(name, occupied).unwrap_or_default();
        self.occupied_bytes = self.occupied_bytes - before + occupied;
        Self::check(self.occupied_bytes)
    }

    fn check(bytes: u64) -> io::Result<()> {
        if bytes <= SETTINGS_BYTES_MAX {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "expected a server whose settings (ParameterStatus) have at most {} in all, found {} or more: check \
             which server answers at this address",
            ByteSize(SETTINGS_BYTES_MAX),
            ByteSize(bytes)
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, length: u32, body: &[u8]) -> Vec<u8> {
        [&[kind][..], &length.to_be_bytes(), body].concat()
    }

    /// Makes a message of `bytes` with its head.
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

    fn report(name: &str, value: &str) -> Vec<u8> {
        let body = format!("{name}\0{value}\0");
        message(SETTING, body.len() as u32 + 4, body.as_bytes())
    }

    #[test]
    fn wall_02_the_settings_that_a_server_reports_are_bounded_for_the_life_of_a_connection() {
        let ready = whole(READY, 6);
        let long = "v".repeat(100 << 10);
        let numbered = |count: usize, value: &str| -> Vec<u8> {
            (0..count).flat_map(|at| report(&format!("name{at}"), value)).collect()
        };
        let over_calls: Vec<u8> = (0..11)
            .flat_map(|at| [report(&at.to_string(), &long), ready.clone()].concat())
            .collect();
        let cases: [(&str, Vec<u8>, bool); 8] = [
            ("what a server reports", numbered(20, "UTF8"), true),
            ("ten long ones", numbered(10, &long), true),
            ("eleven", numbered(11, &long), false),
            ("eleven, each in an answer of its own", over_calls, false),
            ("many short ones", numbered(5_000, ""), false),
            ("one again and again", report("TimeZone", &long).repeat(100), true),
            ("a head alone says too much", message(SETTING, 2 << 20, &[]), false),
            ("no name", message(SETTING, 4, &[]).repeat(10_000), true),
        ];
        for (name, bytes, is_taken) in cases {
            for piece in [1, 7, 1 << 16, bytes.len()] {
                let mut answer = AnswerLength::default();
                let taken = bytes.chunks(piece).try_for_each(|piece| answer.add(piece));
                assert_eq!(taken.is_ok(), is_taken, "{name}, in pieces of {piece}");
            }
        }
    }

    #[test]
    fn what_settings_occupy_is_counted_by_name() {
        let mut answer = AnswerLength::default();
        let reports = [report("a", "12"), report("bc", ""), report("a", "1234"), whole(b'D', 99)];
        reports.iter().for_each(|report| answer.add(report).expect("few"));
        assert_eq!(answer.settings.occupied_bytes, 2 * SETTING_BYTES + 7 + 4);
        assert_eq!(answer.settings.occupied.len(), 2);
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
