//! Bytes of an object, in pieces of one length. A buffer that grows as one piece uses up to twice its content in
//! memory, and three times while it is moved.

use std::io::{self, Write};

use bytes::Bytes;
use object_store::PutPayload;

/// Bytes of a piece. Parts of an upload are whole pieces.
const CHUNK_BYTES: usize = 64 << 10;

/// Bytes in pieces.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    full: Vec<Bytes>,
    open: Vec<u8>,
}

impl Chunks {
    /// Returns the memory that it uses, in bytes.
    pub(super) fn occupied_bytes(&self) -> usize {
        self.full.len() * (CHUNK_BYTES + size_of::<Bytes>()) + self.open.capacity()
    }

    /// Returns all bytes as a payload.
    pub(super) fn into_payload(mut self) -> PutPayload {
        if !self.open.is_empty() {
            self.full.push(self.open.into());
        }
        self.full.into_iter().collect()
    }
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK_BYTES - self.open.len();
        let taken = room.min(bytes.len());
        if !self.full.is_empty() {
            self.open.reserve_exact(room);
        }
        self.open.extend_from_slice(&bytes[..taken]);
        if taken == room {
            self.full.push(std::mem::take(&mut self.open).into());
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Splits a payload into parts of `part_bytes` each; the last one has the rest.
pub(super) fn parts(payload: &PutPayload, part_bytes: usize) -> Vec<PutPayload> {
    let (mut parts, mut part, mut room) = (Vec::new(), Vec::new(), part_bytes);
    for piece in payload {
        let mut piece = piece.clone();
        while piece.len() >= room {
            part.push(piece.split_to(room));
            parts.push(std::mem::take(&mut part).into_iter().collect());
            room = part_bytes;
        }
        if !piece.is_empty() {
            room -= piece.len();
            part.push(piece);
        }
    }
    if !part.is_empty() {
        parts.push(part.into_iter().collect());
    }
    parts
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn fault_38_pieces_hold_what_was_written() {
        for bytes in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES + 7] {
            let written: Vec<u8> = (0..bytes).map(|index| (index % 251) as u8).collect();
            let mut chunks = Chunks::default();
            for piece in written.chunks(1_000) {
                chunks.write_all(piece).unwrap();
            }
            let occupied = chunks.occupied_bytes();
            assert!(occupied < 2 * bytes + CHUNK_BYTES, "{occupied} held for {bytes}");
            let payload = chunks.into_payload();
            assert_eq!(payload.content_length(), bytes);
            assert_eq!(payload.iter().flatten().copied().collect::<Vec<_>>(), written);
        }
    }

    #[test]
    fn fault_38_parts_of_an_upload_are_of_one_length() {
        let pieces = [100, 1, 0, 250, 49].map(|length| Bytes::from(vec![length as u8; length]));
        let payload: PutPayload = pieces.into_iter().collect();
        let found: Vec<usize> =
            parts(&payload, 100).iter().map(PutPayload::content_length).collect();
        assert_eq!(found, [100, 100, 100, 100]);
        let found: Vec<usize> =
            parts(&payload, 150).iter().map(PutPayload::content_length).collect();
        assert_eq!(found, [150, 150, 100]);
        let joined = parts(&payload, 150).iter().flatten().flatten().copied().collect::<Vec<_>>();
        assert_eq!(joined, payload.iter().flatten().copied().collect::<Vec<_>>());
    }
}
