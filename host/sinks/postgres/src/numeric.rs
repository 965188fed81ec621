//! Encodes decimal numbers in the wire form of PostgreSQL's `numeric`, exactly: base 10,000.
//!
//! Source: `numeric_recv` and `set_var_from_str` in PostgreSQL's `src/backend/utils/adt/numeric.c`. The form is: digit
//! count, weight of the first digit (a power of 10,000), sign, display scale (decimal digits after the point), then the
//! digits, 16 bits each.

use bytes::BufMut as _;

use shardmill_sinks_common::rows::decimal::Decimal;
use shardmill_sinks_common::rows::value::Why;

const POSITIVE: u16 = 0x0000;
const NEGATIVE: u16 = 0x4000;
const NAN: u16 = 0xC000;
const PLUS_INFINITY: u16 = 0xD000;
const MINUS_INFINITY: u16 = 0xF000;

/// Decimal digits in one digit of base 10,000.
const GROUP: i64 = 4;

/// Highest number of decimal digits before the point (documentation, "Numeric Types").
const WHOLE_DIGITS_MAX: i64 = 131_072;

/// Highest number of decimal digits after the point.
const SCALE_MAX: i64 = 16_383;

/// Writes the wire form of a number, without its length.
pub(super) fn put(number: &Decimal<'_>, out: &mut Vec<u8>) -> Result<(), Why> {
    let scale = number.exponent.saturating_neg().max(0);
    let length = i64::try_from(number.digits.len()).unwrap_or(i64::MAX);
    let whole_digits = length.saturating_add(number.exponent);
    let is_zero = number.is_zero();
    if scale > SCALE_MAX || (!is_zero && whole_digits > WHOLE_DIGITS_MAX) {
        return Err(format!(
            "a numeric has at most {WHOLE_DIGITS_MAX} digits before the point and {SCALE_MAX} after it"
        )
        .into());
    }
    let scale = u16::try_from(scale).map_err(|_| "the scale is out of range")?;
    if is_zero {
        put_header(out, 0, 0, POSITIVE, scale);
        return Ok(());
    }
    put_digits(number, whole_digits, scale, out)
}

/// Writes a special value of a double.
pub(super) fn put_not_finite(value: f64, out: &mut Vec<u8>) {
    let sign = match (value.is_nan(), value > 0.0) {
        (true, _) => NAN,
        (false, true) => PLUS_INFINITY,
        (false, false) => MINUS_INFINITY,
    };
    put_header(out, 0, 0, sign, 0);
}

/// Writes the digits in groups of four, aligned to the point, without leading and trailing groups of zeros.
fn put_digits(
    number: &Decimal<'_>,
    whole_digits: i64,
    scale: u16,
    out: &mut Vec<u8>,
) -> Result<(), Why> {
    let out_of_range = |_| Why::from("the number is out of range");
    // The power of 10,000 of the first group, and the number of its digits before the first given digit.
    let weight = (whole_digits - 1).div_euclid(GROUP);
    let lead = usize::try_from((weight + 1) * GROUP - whole_digits).unwrap_or(0);
    let digit_at = |place: usize| {
        place.checked_sub(lead).and_then(|place| number.digits.get(place)).map_or(0, |d| d - b'0')
    };
    let count = (lead + number.digits.len()).div_ceil(4);
    let groups = (0..count).map(|group| {
        (0..4).fold(0_u16, |value, digit| value * 10 + u16::from(digit_at(group * 4 + digit)))
    });
    let kept = count - groups.clone().rev().take_while(|group| *group == 0).count();
    let skipped = groups.clone().take_while(|group| *group == 0).count();
    let weight = weight - i64::try_from(skipped).unwrap_or(0);
    put_header(
        out,
        u16::try_from(kept - skipped).map_err(out_of_range)?,
        i16::try_from(weight).map_err(out_of_range)?,
        if number.negative { NEGATIVE } else { POSITIVE },
        scale,
    );
    for group in groups.take(kept).skip(skipped) {
        out.put_u16(group);
    }
    Ok(())
}

fn put_header(out: &mut Vec<u8>, digits: u16, weight: i16, sign: u16, scale: u16) {
    out.put_u16(digits);
    out.put_i16(weight);
    out.put_u16(sign);
    out.put_u16(scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(text: &str) -> Vec<u16> {
        let mut out = Vec::new();
        put(&Decimal::parse(text).expect("a number"), &mut out).expect("in range");
        out.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect()
    }

    #[test]
    fn digits_are_grouped_from_the_point() {
        let minus_one = (-1_i16).cast_unsigned();
        let minus_two = (-2_i16).cast_unsigned();
        for (text, expected) in [
            ("0", vec![0, 0, POSITIVE, 0]),
            ("-0.00", vec![0, 0, POSITIVE, 2]),
            ("1", vec![1, 0, POSITIVE, 0, 1]),
            ("10000", vec![1, 1, POSITIVE, 0, 1]),
            ("12345.678", vec![3, 1, POSITIVE, 3, 1, 2345, 6780]),
            ("-12.50", vec![2, 0, NEGATIVE, 2, 12, 5000]),
            ("0.0001", vec![1, minus_one, POSITIVE, 4, 1]),
            ("0.00001", vec![1, minus_two, POSITIVE, 5, 1000]),
            ("1e4", vec![1, 1, POSITIVE, 0, 1]),
            ("1.5e3", vec![1, 0, POSITIVE, 0, 1500]),
            ("15e-1", vec![2, 0, POSITIVE, 1, 1, 5000]),
            ("100000000", vec![1, 2, POSITIVE, 0, 1]),
        ] {
            assert_eq!(wire(text), expected, "{text}");
        }
    }

    #[test]
    fn what_numeric_does_not_hold_is_refused() {
        for text in ["1e131072", "1e-16384", "1e999999999999999999999", "1e-999999999999999999999"]
        {
            let number = Decimal::parse(text).expect("a number");
            assert!(put(&number, &mut Vec::new()).is_err(), "{text}");
        }
        assert_eq!(wire("1e131071").len(), 5);
        assert_eq!(wire("0e999999999").len(), 4);
    }
}
