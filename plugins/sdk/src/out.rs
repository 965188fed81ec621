//! Output side: outputs and rejects, appended to one arena.

use std::io;

use serde::Serialize;

use crate::bindings::shardmill::plugin::types::Outcome;
use crate::words::{Output, OutputWords, Reject, RejectWords, Span};
use crate::{Error, Record};

/// Collects the outputs and rejects of a batch.
pub struct Outbox {
    arena: Vec<u8>,
    outputs: Vec<OutputWords>,
    rejects: Vec<RejectWords>,
    /// Lowest input that may still be written; it keeps the outcome ordered.
    next_input: u32,
}

impl Outbox {
    /// Reserves space for one output per input and for `arena_bytes` of payload.
    pub(crate) fn with_capacity(inputs: usize, arena_bytes: usize) -> Self {
        Self {
            arena: Vec::with_capacity(arena_bytes),
            outputs: Vec::with_capacity(inputs),
            rejects: Vec::new(),
            next_input: 0,
        }
    }

    /// Starts the outputs of one record. Records must be taken in the order of the batch, each at most once;
    /// those left out are filtered.
    ///
    /// # Panics
    ///
    /// This record or a later one was taken before.
    #[inline]
    pub fn at(&mut self, record: &Record<'_>) -> Emitter<'_> {
        let input = record.index();
        assert!(input >= self.next_input, "records must be taken in the order of the batch");
        self.next_input = input + 1;
        let outputs_start = self.outputs.len();
        let arena_start = self.arena.len();
        Emitter { outbox: self, input, outputs_start, arena_start }
    }

    pub(crate) fn finish(self) -> Outcome {
        Outcome {
            arena: self.arena,
            outputs: self.outputs.into_flattened(),
            rejects: self.rejects.into_flattened(),
        }
    }

    /// Returns the span from `start` to the end of the arena.
    #[inline]
    fn span_from(&self, start: usize) -> Span {
        Span { start: arena_offset(start), length: arena_offset(self.arena.len() - start) }
    }

    #[inline]
    fn append(&mut self, bytes: &[u8]) -> Span {
        let start = self.arena.len();
        append(&mut self.arena, bytes);
        self.span_from(start)
    }
}

/// Appends a few bytes in place. The compiler turns a copy of variable length into `memory.copy`, which calls
/// the host, and JSON is written in small pieces.
#[inline(always)]
fn append(arena: &mut Vec<u8>, bytes: &[u8]) {
    if cfg!(not(target_arch = "wasm32")) {
        return arena.extend_from_slice(bytes);
    }
    // Not a `match`: it would become a jump table, which branch predictors handle badly.
    let length = bytes.len();
    if length > 32 {
        arena.extend_from_slice(bytes);
    } else if length >= 16 {
        append_ends::<16>(arena, bytes);
    } else if length >= 8 {
        append_ends::<8>(arena, bytes);
    } else if length >= 4 {
        append_ends::<4>(arena, bytes);
    } else if length >= 2 {
        append_ends::<2>(arena, bytes);
    } else if let [byte] = bytes {
        arena.push(*byte);
    }
}

/// Appends `N` to `2 * N` bytes as their first and their last `N`: two copies whose length the compiler knows.
#[inline]
fn append_ends<const N: usize>(arena: &mut Vec<u8>, bytes: &[u8]) {
    let (Some(first), Some(last)) = (bytes.first_chunk::<N>(), bytes.last_chunk::<N>()) else {
        return;
    };
    arena.reserve(bytes.len());
    let start = arena.len();
    // SAFETY: `bytes.len()` bytes from `start` are reserved. All of them are written here: the first `N`, and
    // the last `N`, which begin within the first `N` or directly after them, because there are at most `2 * N`
    // bytes. The new length covers no other bytes.
    debug_assert!(bytes.len() <= 2 * N);
    unsafe {
        let end = arena.as_mut_ptr().add(start);
        end.cast::<[u8; N]>().write_unaligned(*first);
        end.add(bytes.len() - N).cast::<[u8; N]>().write_unaligned(*last);
        arena.set_len(start + bytes.len());
    }
}

/// Writer of the outputs of one record. `route` is always an index into
/// [`Descriptor::routes`](crate::Descriptor), counted from 0; an invalid one counts as a trap.
pub struct Emitter<'a> {
    outbox: &'a mut Outbox,
    input: u32,
    outputs_start: usize,
    arena_start: usize,
}

impl Emitter<'_> {
    /// Emits `payload` with the record's own partition key.
    #[inline]
    pub fn emit(&mut self, route: u32, payload: impl AsRef<[u8]>) {
        let payload = self.outbox.append(payload.as_ref());
        self.push(route, None, Some(payload));
    }

    /// Emits `payload` with another partition key.
    pub fn emit_with_key(&mut self, route: u32, key: &str, payload: impl AsRef<[u8]>) {
        let key = self.outbox.append(key.as_bytes());
        let payload = self.outbox.append(payload.as_ref());
        self.push(route, Some(key), Some(payload));
    }

    /// Emits a payload that `write` writes in place. If it fails, nothing is emitted.
    ///
    /// # Errors
    ///
    /// The error of `write`.
    #[inline]
    pub fn emit_with<E>(
        &mut self,
        route: u32,
        write: impl FnOnce(&mut Writer<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.emit_if(route, |payload| write(payload).map(|()| true))
    }

    /// Emits a payload that `write` writes in place. If it returns `false` or fails, nothing is emitted.
    ///
    /// # Errors
    ///
    /// The error of `write`.
    #[inline]
    pub fn emit_if<E>(
        &mut self,
        route: u32,
        write: impl FnOnce(&mut Writer<'_>) -> Result<bool, E>,
    ) -> Result<(), E> {
        let start = self.outbox.arena.len();
        let written = write(&mut Writer::new(&mut self.outbox.arena));
        if let Ok(true) = written {
            let payload = self.outbox.span_from(start);
            self.push(route, None, Some(payload));
        } else {
            self.outbox.arena.truncate(start);
        }
        written.map(|_| ())
    }

    /// Emits `value` as JSON.
    ///
    /// # Errors
    ///
    /// If `value` cannot be represented, such as a map with keys that are not strings.
    #[inline]
    pub fn emit_json(&mut self, route: u32, value: &impl Serialize) -> Result<(), Error> {
        self.emit_with(route, |payload| Ok(serde_json::to_writer(payload, value)?))
    }

    /// Passes the record on unchanged, without a copy.
    #[inline]
    pub fn pass(&mut self, route: u32) {
        self.push(route, None, None);
    }

    /// Passes the payload on without a copy, with another partition key.
    pub fn pass_with_key(&mut self, route: u32, key: &str) {
        let key = self.outbox.append(key.as_bytes());
        self.push(route, Some(key), None);
    }

    /// Rejects the record with this reason, and removes what was emitted for it.
    /// [`Plugin::record`](crate::Plugin::record) does this with the error that it returns.
    pub fn reject(self, reason: &str) {
        self.outbox.outputs.truncate(self.outputs_start);
        self.outbox.arena.truncate(self.arena_start);
        let reason = self.outbox.append(reason.as_bytes());
        self.outbox.rejects.push(Reject { input: self.input, reason }.to_words());
    }

    #[inline]
    fn push(&mut self, route: u32, key: Option<Span>, payload: Option<Span>) {
        let output = Output { input: self.input, route, key, payload };
        self.outbox.outputs.push(output.to_words());
    }
}

/// Appends to a payload in the arena. Writing never fails.
pub struct Writer<'a> {
    arena: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Makes a writer at the end of `arena`. An [`Emitter`] makes its own.
    pub fn new(arena: &'a mut Vec<u8>) -> Self {
        Self { arena }
    }

    /// Returns the current end of the arena, for [`Writer::take_back`].
    #[inline]
    pub fn written(&self) -> usize {
        self.arena.len()
    }

    /// Removes what was written since [`Writer::written`] returned `end`.
    pub fn take_back(&mut self, end: usize) {
        self.arena.truncate(end);
    }

    /// Appends `bytes`.
    #[inline]
    pub fn append(&mut self, bytes: impl AsRef<[u8]>) {
        append(self.arena, bytes.as_ref());
    }

    /// Appends `text` as a JSON string, including quotes. If nothing needs an escape, it is much faster than a
    /// serializer: loop iterations are expensive in the sandbox, and this one processes up to 64 bytes per
    /// iteration.
    #[inline]
    pub fn append_json_string(&mut self, text: &str) {
        if needs_escape(text.as_bytes()) {
            // A text can always be represented, and writing never fails.
            let _ = serde_json::to_writer(&mut *self, text);
        } else {
            self.arena.push(b'"');
            append(self.arena, text.as_bytes());
            self.arena.push(b'"');
        }
    }
}

/// Whether a JSON string of these bytes needs an escape.
#[inline]
fn needs_escape(bytes: &[u8]) -> bool {
    let (quads, rest) = bytes.as_chunks::<64>();
    let (blocks, _) = rest.as_chunks::<16>();
    // Checks the last 16 bytes again, instead of each byte of the rest by itself.
    let last = bytes.last_chunk::<16>();
    quads.iter().any(|quad| {
        let (blocks, _) = quad.as_chunks::<16>();
        blocks.iter().fold(false, |found, block| found | needs_escape_in(block))
    }) || blocks.iter().any(needs_escape_in)
        || last.map_or_else(|| bytes.iter().copied().any(is_escaped), needs_escape_in)
}

#[cfg(target_feature = "simd128")]
#[inline]
fn needs_escape_in(block: &[u8; 16]) -> bool {
    use std::arch::wasm32::{u8x16_eq, u8x16_lt, u8x16_splat, v128_any_true, v128_load, v128_or};
    // SAFETY: the block has the 16 bytes that are read, and a load needs no alignment.
    let block = unsafe { v128_load(block.as_ptr().cast()) };
    let quotation_mark = u8x16_eq(block, u8x16_splat(b'"'));
    let reverse_solidus = u8x16_eq(block, u8x16_splat(b'\\'));
    let control = u8x16_lt(block, u8x16_splat(0x20));
    v128_any_true(v128_or(control, v128_or(quotation_mark, reverse_solidus)))
}

/// Checks eight bytes at once: sets the high bit of each byte that needs an escape, and possibly of the bytes
/// above it.
#[cfg(not(target_feature = "simd128"))]
#[inline]
fn needs_escape_in(block: &[u8; 16]) -> bool {
    const ONES: u64 = u64::MAX / 255;
    const HIGH_BITS: u64 = ONES << 7;
    let below = |word: u64, limit: u8| word.wrapping_sub(ONES * u64::from(limit)) & !word;
    let equal = |word: u64, byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    let (words, _) = block.as_chunks::<8>();
    words
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .fold(0, |found, word| found | below(word, 0x20) | equal(word, b'"') | equal(word, b'\\'))
        & HIGH_BITS
        != 0
}

/// RFC 8259, section 7: the quotation mark, the reverse solidus and the control characters.
#[inline]
fn is_escaped(byte: u8) -> bool {
    (byte < 0x20) | (byte == b'"') | (byte == b'\\')
}

impl io::Write for Writer<'_> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        append(self.arena, bytes);
        Ok(bytes.len())
    }

    #[inline]
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        append(self.arena, bytes);
        Ok(())
    }

    #[inline]
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Converts an offset. Spans have 32 bits, like the addresses of a plugin's memory: the conversion is free in
/// WebAssembly, and a native test that exceeds it fails.
#[inline]
#[expect(clippy::expect_used, reason = "cannot fail in WebAssembly")]
fn arena_offset(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("an outcome's arena is limited to 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_string_is_what_a_serializer_writes() {
        // Every ASCII character, and some others, at every place of a block, a word and the rest.
        let odd = (0..0x80).map(char::from).chain("\u{7ff}\u{1F697}\u{ffff}".chars());
        for odd in odd {
            for before in 0..40 {
                let text = format!("{}{odd}{}", "a".repeat(before), "z".repeat(39 - before));
                let mut arena = Vec::new();
                Writer::new(&mut arena).append_json_string(&text);
                assert_eq!(arena, serde_json::to_vec(&text).unwrap(), "{text:?}");
            }
        }
    }
}
