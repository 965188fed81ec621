//! Parses decimal numbers of any precision into exact parts.
//!
//! Accepts JSON's number grammar, and leading zeros, which strings may have. Sinks convert the parts to their formats.

use std::borrow::Cow;

/// Parts of a decimal number: `digits` × 10^`exponent`.
#[derive(Debug, PartialEq, Eq)]
pub struct Decimal<'a> {
    /// Whether the number has a minus sign; minus zero has one.
    pub negative: bool,
    /// ASCII digits without leading zeros; empty is zero. Trailing zeros stay: 1.50 is 150 × 10^-2.
    pub digits: Cow<'a, [u8]>,
    /// Power of ten of the last digit.
    pub exponent: i64,
}

impl<'a> Decimal<'a> {
    /// Parses `-?digits[.digits][(e|E)[+|-]digits]`; `None` for anything else.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (negative, rest) = match text.as_bytes() {
            [b'-', rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        let (whole, rest) = take_digits(rest)?;
        let (fraction, rest) = match rest {
            [b'.', rest @ ..] => take_digits(rest)?,
            rest => (&[][..], rest),
        };
        let written = match rest {
            [] => 0,
            [b'e' | b'E', rest @ ..] => parse_exponent(rest)?,
            _ => return None,
        };
        let digits = match fraction {
            [] => Cow::Borrowed(without_leading_zeros(whole)),
            _ if without_leading_zeros(whole).is_empty() => {
                Cow::Borrowed(without_leading_zeros(fraction))
            }
            _ => Cow::Owned([without_leading_zeros(whole), fraction].concat()),
        };
        let exponent = written.saturating_sub(i64::try_from(fraction.len()).ok()?);
        Some(Self { negative, digits, exponent })
    }

    /// Returns whether the number is zero.
    pub fn is_zero(&self) -> bool {
        self.digits.iter().all(|digit| *digit == b'0')
    }

    /// Returns whether the number is an integer, of any size.
    pub fn is_integer(&self) -> bool {
        let dropped = self.digits.len() - without_trailing_zeros(&self.digits).len();
        let dropped = i64::try_from(dropped).unwrap_or(i64::MAX);
        self.is_zero() || self.exponent.saturating_add(dropped) >= 0
    }

    /// Returns the number as an integer of 64 bits, if it is one exactly.
    pub fn to_i64(&self) -> Option<i64> {
        i64::try_from(self.to_unscaled(0)?).ok()
    }

    /// Returns the number times 10^`scale` as an integer of 128 bits, if it is one exactly.
    pub fn to_unscaled(&self, scale: u32) -> Option<i128> {
        let significant = without_trailing_zeros(&self.digits);
        if significant.is_empty() {
            return Some(0);
        }
        let dropped = i64::try_from(self.digits.len() - significant.len()).ok()?;
        let exponent = self.exponent.saturating_add(dropped).saturating_add(i64::from(scale));
        let exponent = u32::try_from(exponent).ok()?;
        let digits: i128 = std::str::from_utf8(significant).ok()?.parse().ok()?;
        let magnitude = digits.checked_mul(10_i128.checked_pow(exponent)?)?;
        Some(if self.negative { -magnitude } else { magnitude })
    }

    /// Returns whether two numbers are equal, whatever their zeros and exponents.
    pub fn is_same_number(&self, other: &Decimal<'_>) -> bool {
        let parts = |number: &Decimal<'_>| {
            let significant = without_trailing_zeros(&number.digits).to_vec();
            let dropped = number.digits.len() - significant.len();
            let exponent = number.exponent.saturating_add(i64::try_from(dropped).unwrap_or(0));
            (significant, exponent)
        };
        match (self.is_zero(), other.is_zero()) {
            (true, zero) | (zero, true) => zero && self.is_zero(),
            _ => self.negative == other.negative && parts(self) == parts(other),
        }
    }
}

/// Splits after one or more digits at the beginning.
fn take_digits(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

fn without_leading_zeros(digits: &[u8]) -> &[u8] {
    let start = digits.iter().position(|digit| *digit != b'0').unwrap_or(digits.len());
    &digits[start..]
}

/// Returns the digits up to the last one that is not zero.
fn without_trailing_zeros(digits: &[u8]) -> &[u8] {
    let end = digits.iter().rposition(|digit| *digit != b'0').map_or(0, |last| last + 1);
    &digits[..end]
}

/// Parses an exponent. Beyond 64 bits it saturates: no type of any table can store such a number.
fn parse_exponent(text: &[u8]) -> Option<i64> {
    let (sign, digits) = match text {
        [b'-', digits @ ..] => (-1, digits),
        [b'+', digits @ ..] | digits => (1, digits),
    };
    let (digits, rest) = take_digits(digits)?;
    let magnitude = digits.iter().fold(0_i64, |value, digit| {
        value.saturating_mul(10).saturating_add(i64::from(digit - b'0'))
    });
    rest.is_empty().then_some(sign * magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decimal(text: &str) -> Decimal<'_> {
        Decimal::parse(text).unwrap_or_else(|| panic!("{text} is a number"))
    }

    #[test]
    fn parts_are_exact() {
        for (text, digits, exponent) in [
            ("0", "", 0),
            ("0.00", "00", -2),
            ("-12.50", "1250", -2),
            ("0.05", "5", -2),
            ("007", "7", 0),
            ("1.5e3", "15", 2),
            ("1E-400", "1", -400),
        ] {
            let number = decimal(text);
            let zeros_stripped = digits.trim_start_matches('0');
            assert_eq!(&*number.digits, zeros_stripped.as_bytes(), "{text}");
            assert_eq!(number.exponent, exponent, "{text}");
        }
        for text in ["", "-", ".5", "1.", "1e", "1e+", "+1", "0x1", " 1", "1 ", "NaN", "1_0"] {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
    }

    #[test]
    fn integers_are_exact_or_none() {
        for (text, integer) in [
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("1e18", Some(1_000_000_000_000_000_000)),
            ("100e-2", Some(1)),
            ("3.000", Some(3)),
            ("3.5", None),
            ("-0", Some(0)),
            ("0e999999999999999999999", Some(0)),
            ("1e999999999999999999999", None),
        ] {
            assert_eq!(decimal(text).to_i64(), integer, "{text}");
        }
    }

    #[test]
    fn scaled_numbers_are_exact_or_none() {
        for (text, unscaled) in [
            ("12.5", Some(1250)),
            ("-12.50", Some(-1250)),
            ("1e2", Some(10_000)),
            ("0.005", None),
            ("0.000", Some(0)),
            ("1e40", None),
        ] {
            assert_eq!(decimal(text).to_unscaled(2), unscaled, "{text}");
        }
    }

    #[test]
    fn sameness_is_by_number() {
        assert!(decimal("1.50").is_same_number(&decimal("15e-1")));
        assert!(decimal("0.0").is_same_number(&decimal("-0")));
        assert!(!decimal("0").is_same_number(&decimal("1")));
        assert!(!decimal("1").is_same_number(&decimal("-1")));
    }
}
