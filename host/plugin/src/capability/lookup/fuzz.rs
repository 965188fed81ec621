//! Compares the arguments and the answer of `lookup.get` with the documented limits, written as plain code.

use std::sync::Arc;

use fastrand::Rng;

use super::words::{self, BadKeys};
use shardmill_core::fuzzing::{Choices, FuzzTarget};

/// Checks that [`words::keys`] accepts exactly the keys that a call may have, and that the answer reads back as the
/// rows.
pub const ARGUMENTS: FuzzTarget =
    FuzzTarget { name: "arguments", run, grow, words: &["key", "é", "→", "\u{1f600}", "\0"] };

/// Maximum number of keys of a call.
const KEYS_MAX: usize = 100_000;
/// Maximum length of a key, in bytes: 8 KiB.
const KEY_BYTES_MAX: u64 = 8_192;
/// Maximum size of all keys of a call, in bytes: 8 MiB.
const ALL_BYTES_MAX: u64 = 8_388_608;

/// Bytes of text after an arena, so that keys can be as long as allowed, and longer.
const FILLERS: [usize; 6] = [0, 0, 0, 8_191, 8_193, 20_000];
/// Lengths of keys around the limits.
const LENGTHS: [u32; 5] = [83, 84, 8_191, 8_192, 8_193];
/// Number of repetitions of the same keys, around the limits.
const TIMES: [usize; 6] = [2, 1_023, 1_024, 1_025, 100_000, 100_001];
/// Characters of the generated texts.
const CHARACTERS: [char; 6] = ['a', '7', '\0', 'é', '→', '\u{1f600}'];

fn run(data: &[u8]) {
    let mut choices = Choices::new(data);
    run_keys(&mut choices);
    run_rows(&mut choices);
}

fn run_keys(choices: &mut Choices<'_>) {
    let length = choices.below(64);
    let mut arena = choices.bytes(length).to_vec();
    let filler = *choices.one_of(&FILLERS);
    arena.resize(arena.len() + filler, b'x');
    let mut spans: Vec<[u32; 2]> =
        (0..choices.below(8)).map(|_| span(choices, arena.len())).collect();
    // Rarely: large inputs take long.
    if choices.byte() >= 248 {
        spans = spans.repeat(*choices.one_of(&TIMES));
        spans.truncate(KEYS_MAX + 1);
    }
    let mut words: Vec<u32> = spans.concat();
    if choices.byte() >= 250 {
        words.push(choices.word());
    }

    let expected = reference(&arena, &words);
    let in_memory: Vec<u32> = words.iter().map(|word| word.to_le()).collect();
    let found = words::keys(&arena, &in_memory);
    let found = found.map(|keys| keys.into_iter().map(str::as_bytes).collect::<Vec<_>>());
    assert!(
        found == expected,
        "expected {:?}, found {:?}: {} words of an arena of {} bytes",
        expected.as_ref().map(Vec::len),
        found.as_ref().map(Vec::len),
        words.len(),
        arena.len()
    );
}

/// Creates a span: within the arena, at a limit, or arbitrary.
fn span(choices: &mut Choices<'_>, arena_bytes: usize) -> [u32; 2] {
    match choices.byte() {
        0..=149 => {
            let start = choices.below(arena_bytes + 1);
            let length = choices.below(arena_bytes - start + 1);
            [start as u32, length as u32]
        }
        150..=179 => {
            let start = choices.below(arena_bytes + 1);
            [start as u32, (arena_bytes - start) as u32]
        }
        180..=229 => [choices.below(8) as u32, *choices.one_of(&LENGTHS)],
        230..=244 => [choices.byte().into(), choices.byte().into()],
        _ => [choices.word(), choices.word()],
    }
}

/// Reads keys by the documented rules: first their number, then their lengths, then their positions and text.
fn reference<'a>(arena: &'a [u8], words: &[u32]) -> Result<Vec<&'a [u8]>, BadKeys> {
    if !words.len().is_multiple_of(2) {
        return Err(BadKeys::Odd(words.len()));
    }
    let count = words.len() / 2;
    if count > KEYS_MAX {
        return Err(BadKeys::TooMany(count));
    }
    let mut all_bytes = 0;
    for key in 0..count {
        let bytes = words[2 * key + 1];
        if u64::from(bytes) > KEY_BYTES_MAX {
            return Err(BadKeys::TooLong { key, bytes });
        }
        all_bytes += u64::from(bytes);
        if all_bytes > ALL_BYTES_MAX {
            return Err(BadKeys::TooLarge);
        }
    }
    let mut keys = Vec::new();
    for key in 0..count {
        let start = u64::from(words[2 * key]);
        let end = start + u64::from(words[2 * key + 1]);
        if end > arena.len() as u64 {
            return Err(BadKeys::OutOfArena { key, end, arena: arena.len() });
        }
        let bytes = &arena[start as usize..end as usize];
        if !is_text(bytes) {
            return Err(BadKeys::NotText(key));
        }
        keys.push(bytes);
    }
    Ok(keys)
}

/// Whether bytes are UTF-8, by the table of RFC 3629.
fn is_text(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some((&first, tail)) = rest.split_first() {
        // For each range of first bytes: the number of bytes that follow, the significant bits of the first one,
        // and the smallest code that is not encoded too long.
        let (more, bits, least) = match first {
            0x00..=0x7f => (0, 0x7f, 0),
            0xc0..=0xdf => (1, 0x1f, 0x80),
            0xe0..=0xef => (2, 0x0f, 0x800),
            0xf0..=0xf7 => (3, 0x07, 0x1_0000),
            _ => return false,
        };
        let Some((following, tail)) = tail.split_at_checked(more) else { return false };
        let mut code = u32::from(first & bits);
        for byte in following {
            if byte & 0xc0 != 0x80 {
                return false;
            }
            code = (code << 6) | u32::from(byte & 0x3f);
        }
        if code < least || code > 0x10_ffff || (0xd800..=0xdfff).contains(&code) {
            return false;
        }
        rest = tail;
    }
    true
}

fn run_rows(choices: &mut Choices<'_>) {
    let mut rows: Vec<Option<Arc<str>>> = Vec::new();
    for _ in 0..choices.below(8) {
        let row = match choices.byte() {
            0..=59 => None,
            60..=99 => rows.last().cloned().flatten(),
            _ => {
                let length = choices.below(40);
                Some(Arc::from(String::from_utf8_lossy(choices.bytes(length))))
            }
        };
        rows.push(row);
    }
    let bytes_max = *choices.one_of(&[usize::MAX, 1 << 20, 0, 1, 20, 60]);
    let bytes: usize = rows.iter().flatten().map(|row| row.len()).sum();
    match words::found(&rows, bytes_max) {
        Ok((arena, words)) => {
            assert!(bytes <= bytes_max, "{bytes} of {bytes_max}");
            assert_eq!(arena.len(), bytes);
            let read = words.chunks(2).map(|span| match span {
                [u32::MAX, 0] => None,
                [start, length] => {
                    Some(&arena[*start as usize..*start as usize + *length as usize])
                }
                _ => panic!("half a span: {words:?}"),
            });
            let given = rows.iter().map(|row| row.as_ref().map(|row| row.as_bytes()));
            assert_eq!(read.collect::<Vec<_>>(), given.collect::<Vec<_>>());
        }
        Err(error) => {
            assert!(bytes > bytes_max, "{bytes} of {bytes_max}");
            assert!(error.to_string().contains(&format!("more than {bytes_max} bytes")), "{error}");
        }
    }
}

fn grow(random: &mut Rng) -> Vec<u8> {
    // An arena of text: random bytes rarely are.
    let text: String =
        (0..random.usize(..16)).map(|_| CHARACTERS[random.usize(..CHARACTERS.len())]).collect();
    let mut input = vec![text.len() as u8];
    input.extend(text.bytes());
    input.extend((0..random.usize(..120)).map(|_| random.u8(..)));
    input
}
