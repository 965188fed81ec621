//! Writes the lines of a commit to an output that other writers share.

use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most bytes that are gathered before they are written. Many lines of the usual size are written with one call.
const PIECE_BYTES: usize = 64 << 10;

/// Writer that gathers text and writes it in pieces. It locks the output from the first piece to the end, so that lines
/// of other writers are never within a line, nor between the lines of one commit.
pub(super) struct Pieces<'o> {
    output: &'o Mutex<dyn Write + Send>,
    locked: Option<MutexGuard<'o, dyn Write + Send + 'static>>,
    gathered: Vec<u8>,
    bytes_written: u64,
}

impl<'o> Pieces<'o> {
    pub(super) fn new(output: &'o Mutex<dyn Write + Send>) -> Self {
        Self { output, locked: None, gathered: Vec::new(), bytes_written: 0 }
    }

    /// Writes the rest. Returns the number of bytes written in all.
    pub(super) fn finish(mut self) -> io::Result<u64> {
        self.flush()?;
        Ok(self.bytes_written)
    }

    fn locked(&mut self) -> &mut MutexGuard<'o, dyn Write + Send + 'static> {
        let output = self.output;
        self.locked.get_or_insert_with(|| output.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn send(&mut self, piece: &[u8]) -> io::Result<()> {
        self.locked().write_all(piece)?;
        self.bytes_written += piece.len() as u64;
        Ok(())
    }

    fn send_gathered(&mut self) -> io::Result<()> {
        let mut gathered = std::mem::take(&mut self.gathered);
        self.send(&gathered)?;
        gathered.clear();
        self.gathered = gathered;
        Ok(())
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.gathered.len() + bytes.len() > PIECE_BYTES {
            self.send_gathered()?;
        }
        let mut rest = bytes;
        // An output that escapes control characters copies each write, so a large text is split, too.
        while rest.len() > PIECE_BYTES {
            let (piece, after) = rest.split_at(whole_characters(rest));
            self.send(piece)?;
            rest = after;
        }
        self.gathered.extend_from_slice(rest);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_gathered()?;
        self.locked().flush()
    }
}

/// Returns the end of the last whole character in the first piece of a longer text. Bytes that are not UTF-8 are split
/// anywhere.
fn whole_characters(bytes: &[u8]) -> usize {
    let is_boundary = |at: &usize| bytes[*at] & 0xC0 != 0x80;
    (PIECE_BYTES - 3..=PIECE_BYTES).rev().find(is_boundary).unwrap_or(PIECE_BYTES)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Output that keeps each write.
    struct Writes(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("whole").push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn writes(texts: &[&str]) -> Vec<Vec<u8>> {
        let writes = Arc::new(Mutex::new(Vec::new()));
        let output: Arc<Mutex<dyn Write + Send>> = Arc::new(Mutex::new(Writes(writes.clone())));
        let mut pieces = Pieces::new(&output);
        for text in texts {
            pieces.write_all(text.as_bytes()).expect("written");
        }
        let bytes: usize = texts.iter().map(|text| text.len()).sum();
        assert_eq!(pieces.finish().expect("written"), bytes as u64);
        let writes = writes.lock().expect("whole");
        assert_eq!(writes.concat(), texts.concat().into_bytes());
        writes.clone()
    }

    #[test]
    fn small_lines_go_out_together_and_a_large_one_in_pieces_of_whole_characters() {
        assert_eq!(writes(&["a\n"; 1_000]).len(), 1);
        let line = "é€😀".repeat(PIECE_BYTES);
        let written = writes(&["# ", &line, "\n"]);
        assert!(written.len() > 9);
        for piece in written {
            assert!(piece.len() <= PIECE_BYTES && std::str::from_utf8(&piece).is_ok());
        }
    }
}
