//! Implementations of the faults.

use std::hint::black_box;

const PIECE_BYTES: usize = 1 << 20;

/// Ends with a trap.
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

/// Never ends, and recurses deeper and deeper.
#[expect(unconditional_recursion, reason = "a full stack is what was ordered")]
pub fn recurse(depth: u64) -> u64 {
    black_box(recurse(black_box(depth + 1))) + depth
}

/// Allocates until the host refuses, then ends with a trap.
pub fn grow() -> ! {
    loop {
        black_box(Vec::<u8>::with_capacity(PIECE_BYTES)).leak();
    }
}

/// Never ends: every iteration is one instruction that copies megabytes.
pub fn copy() -> ! {
    let mut bytes = vec![1_u8; 6 * PIECE_BYTES];
    let end = bytes.len() - 1;
    loop {
        bytes.copy_within(..end, 1);
        black_box(&mut bytes);
    }
}

/// Allocates until the host refuses, then frees everything.
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

/// Returns a string with bytes that are not UTF-8.
pub fn no_utf8() -> String {
    // SAFETY: unsound on purpose. Nothing here reads the string: it goes to the host, whose check is tested.
    unsafe { String::from_utf8_unchecked(b"\xff\xfe".to_vec()) }
}

/// Overwrites the heap around a new allocation, including the allocator's metadata.
pub fn corrupt() {
    const BYTES: usize = 4 << 10;
    let start = Box::leak(Box::new(0_u64)) as *mut u64 as *mut u8;
    // SAFETY: unsound on purpose. The write stays within linear memory, below the end that other allocations
    // have reached; what is there is destroyed, as configured.
    unsafe { black_box(start).sub(16).write_bytes(0xA5, BYTES) };
}
