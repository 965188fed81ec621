//! Reference for decimal numbers with any number of digits.

#![allow(
    missing_docs,
    reason = "shared with the fuzz targets alone; each name says what it is a case of"
)]

use fastrand::Rng;

/// Largest exponent. Larger ones are read as this one: no column can store them, and arithmetic does not overflow.
const EXPONENT_MAX: i64 = 1 << 40;

/// `digits` × 10^`exponent`. Zero has no digits.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    negative: bool,
    /// Digits without zeros at the beginning and the end.
    digits: String,
    pub exponent: i64,
}

impl Number {
    /// Reads a number, and the number of digits that it shows after its point.
    pub fn read(text: &str) -> Option<(Self, i64)> {
        let (negative, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (mantissa, exponent) = match unsigned.find(['e', 'E']) {
            Some(place) => (&unsigned[..place], Self::read_exponent(&unsigned[place + 1..])?),
            None => (unsigned, 0),
        };
        let (whole, fraction) = match mantissa.split_once('.') {
            Some((_, "")) => return None,
            Some(parts) => parts,
            None => (mantissa, ""),
        };
        if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) {
            return None;
        }
        let scale = (fraction.len() as i64 - exponent).max(0);
        Some((
            Self::of(negative, &(whole.to_owned() + fraction), exponent - fraction.len() as i64),
            scale,
        ))
    }

    /// Makes a number of digits, which may have zeros at both ends.
    pub fn of(negative: bool, digits: &str, exponent: i64) -> Self {
        let significant = digits.trim_end_matches('0');
        let dropped = (digits.len() - significant.len()) as i64;
        let digits = significant.trim_start_matches('0').to_owned();
        match digits.is_empty() {
            true => Self { negative: false, digits, exponent: 0 },
            false => Self { negative, digits, exponent: exponent + dropped },
        }
    }

    fn read_exponent(text: &str) -> Option<i64> {
        let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
        if digits.is_empty() || !is_digits(digits) {
            return None;
        }
        let significant = digits.trim_start_matches('0');
        let size = match significant.len() {
            0 => 0,
            1..=12 => significant.parse::<i64>().ok()?.min(EXPONENT_MAX),
            _ => EXPONENT_MAX,
        };
        Some(if text.starts_with('-') { -size } else { size })
    }

    pub fn is_zero(&self) -> bool {
        self.digits.is_empty()
    }

    /// Counts the digits before the point. Below zero: the zeros after it.
    pub fn whole_digits(&self) -> i64 {
        self.digits.len() as i64 + self.exponent
    }

    /// Returns the number as an integer, if it is one of at most 38 digits.
    pub(crate) fn to_integer(&self) -> Option<i128> {
        if self.is_zero() {
            return Some(0);
        }
        if self.exponent < 0 || self.whole_digits() > 38 {
            return None;
        }
        let written = self.digits.clone() + &"0".repeat(self.exponent as usize);
        let value: i128 = written.parse().ok()?;
        Some(if self.negative { -value } else { value })
    }

    /// Returns whether the shortest digits of a double are this number.
    pub(crate) fn is_shortest_of(&self, double: f64) -> bool {
        Self::read(&format!("{double:e}")).is_some_and(|(shown, _)| shown == *self)
    }

    /// Returns whether all digits of a double, or the shortest ones, are this number.
    pub(crate) fn is_shown_by(&self, double: f64) -> bool {
        let is_exact = Self::read(&format!("{double:.0}")).is_some_and(|(shown, _)| shown == *self);
        double.is_finite() && (is_exact || self.is_shortest_of(double))
    }
}

fn is_digits(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_digit())
}

/// Makes a number as people and programs write it, often one at the edges of types.
pub fn written(random: &mut Rng) -> String {
    let edges = [
        "0",
        "-0",
        "7",
        "32767",
        "-32768",
        "32768",
        "2147483647",
        "-2147483649",
        "9007199254740993",
        "9223372036854775807",
        "-9223372036854775808",
        "9223372036854775808",
        "1180591620717411303424",
        "0.1",
        "1.50",
        "12345678.99",
        "0.000001",
        "99999999.995",
        "3.4028235e38",
        "3.5e38",
        "1.8e308",
        "5e-324",
        "1e-400",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e131071",
        "1e131072",
        "1e-16383",
        "1e-16384",
    ];
    if random.bool() {
        return random.choice(edges).unwrap_or("0").to_owned();
    }
    let mut digits = |most: usize| -> String {
        let length = random.usize(1..=most);
        (0..length)
            .map(|_| random.choice("0011259".chars().collect::<Vec<_>>()).unwrap_or('0'))
            .collect()
    };
    let most = if digits(1) == "9" { 48 } else { 12 };
    let (whole, fraction) = (digits(most), digits(8));
    let whole = whole.trim_start_matches('0');
    let whole = if whole.is_empty() { "0" } else { whole };
    let sign = if random.u8(..3) == 0 { "-" } else { "" };
    let fraction = if random.bool() { format!(".{fraction}") } else { String::new() };
    let exponent = match random.u8(..4) {
        0 => format!("e{}", random.i32(-30..30)),
        _ => String::new(),
    };
    format!("{sign}{whole}{fraction}{exponent}")
}
