//! Memory that an answer with records occupies while it is read, and the largest answer that is accepted.

/// Highest number of bytes of an answer with records, as sent.
///
/// Source: API reference, GetRecords: 10 MiB of data, which are 13.4 MiB of base64. Ten thousand records with their
/// sequence numbers, times and usual keys add about 4.5 MiB. Keys may be much longer; if an answer would be too large,
/// fewer records are requested.
pub const ANSWER_BYTES_MAX: u64 = 20 << 20;
/// Highest number of JSON values in an answer: ten thousand records have six each, and ten thousand shards ten.
pub const ANSWER_VALUES_MAX: u64 = 120_000;
/// Bytes that a JSON value takes, besides its text: a sixth of a record without its bytes.
const VALUE_BYTES: u64 = 24;

/// Highest number of bytes of memory that an answer with records occupies while it is read.
pub const READ_BYTES_MAX: usize = occupied_while_read(ANSWER_BYTES_MAX, ANSWER_VALUES_MAX);

/// Returns the bytes of memory that an answer of `bytes` and `values` occupies while it is read: its text, which the
/// SDK keeps until all of it is decoded, and the decoded base64.
pub const fn occupied_while_read(bytes: u64, values: u64) -> usize {
    // Base64 decodes four bytes to three.
    (bytes + bytes.div_ceil(4) * 3 + values * VALUE_BYTES) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_02_an_answer_occupies_its_text_and_what_it_becomes() {
        for (bytes, values, occupied) in [
            (0, 0, 0),
            (1_000, 0, 1_750),
            (1_000, 6, 1_894),
            (ANSWER_BYTES_MAX, ANSWER_VALUES_MAX, READ_BYTES_MAX),
        ] {
            assert_eq!(
                occupied_while_read(bytes, values),
                occupied,
                "{bytes} bytes, {values} values"
            );
        }
        const { assert!(READ_BYTES_MAX < 40 << 20, "the printed bound stays small") };
    }

    #[test]
    fn wall_02_what_one_call_of_aws_may_give_is_taken() {
        // A record besides its data: names, a sequence number of 56 digits, a time, an encryption type, a usual key.
        const RECORD_BYTES: u64 = 450;
        for records in [1, 10, 1_000, 10_000] {
            let bytes = (10_u64 << 20).div_ceil(3) * 4 + records * RECORD_BYTES;
            assert!(bytes <= ANSWER_BYTES_MAX, "{bytes} bytes with {records} records");
            assert!(records * 6 + 10 <= ANSWER_VALUES_MAX, "{records} records");
        }
    }
}
