//! What the misdeeds do.

use std::hint::black_box;

const PIECE_BYTES: usize = 1 << 20;

/// Ends by a trap.
#[expect(clippy::panic, reason = "a trap is what was ordered")]
pub fn trap() -> ! {
    panic!("hostile: as configured")
}

/// Never ends.
pub fn spin() -> ! {
    let mut turns = 0_u64;
    loop {
        turns = black_box(turns.wrapping_add(1));
    }
}

/// Never ends, deeper and deeper.
#[expect(unconditional_recursion, reason = "a full stack is what was ordered")]
pub fn recurse(depth: u64) -> u64 {
    black_box(recurse(black_box(depth + 1))) + depth
}

/// Allocates until the host refuses, and ends by a trap.
pub fn grow() -> ! {
    loop {
        black_box(Vec::<u8>::with_capacity(PIECE_BYTES)).leak();
    }
}

/// Never ends: every turn is one instruction that copies megabytes.
pub fn copy() -> ! {
    let mut bytes = vec![1_u8; 6 * PIECE_BYTES];
    let end = bytes.len() - 1;
    loop {
        bytes.copy_within(..end, 1);
        black_box(&mut bytes);
    }
}

/// Allocates until the host refuses, and frees it all.
pub fn strain() {
    let mut pieces = Vec::new();
    loop {
        let mut piece = Vec::<u8>::new();
        if piece.try_reserve_exact(PIECE_BYTES).is_err() {
            return;
        }
        pieces.push(black_box(piece));
    }
}

/// Bytes that are no UTF-8, in the place of text.
pub fn no_utf8() -> String {
    // SAFETY: none. Nothing here reads the text: it goes to the host, whose check is under test.
    unsafe { String::from_utf8_unchecked(b"\xff\xfe".to_vec()) }
}

/// Overwrites the heap around a fresh allocation: the allocator's own notes among it.
pub fn corrupt() {
    const BYTES: usize = 4 << 10;
    let start = Box::leak(Box::new(0_u64)) as *mut u64 as *mut u8;
    // SAFETY: none. It stays within linear memory, below the end that other allocations have
    // reached; what lies there is destroyed, as was ordered.
    unsafe { black_box(start).sub(16).write_bytes(0xA5, BYTES) };
}
