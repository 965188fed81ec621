//! Reference for dates and times: counts day by day.

use fastrand::Rng;

use super::Type;

const SECOND: i64 = 1_000_000;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// Counts the days from 1970-01-01 to a date `YYYY-MM-DD` of the years 1 to 9999.
pub fn date(text: &str) -> Option<i64> {
    let parts: Vec<&str> = text.split('-').collect();
    let [year, month, day] = parts[..] else { return None };
    let (year, month, day) = (digits(year, 4)?, digits(month, 2)?, digits(day, 2)?);
    let is_date =
        year >= 1 && (1..=12).contains(&month) && (1..=days_of(year, month)).contains(&day);
    if !is_date {
        return None;
    }
    let years: i64 = match year >= 1970 {
        true => (1970..year).map(days_of_year).sum(),
        false => -(year..1970).map(days_of_year).sum::<i64>(),
    };
    let months: i64 = (1..month).map(|month| days_of(year, month)).sum();
    Some(years + months + day - 1)
}

/// Counts the microseconds from 1970 to the beginning of a date.
pub(crate) fn micros_of(date_text: &str) -> i64 {
    date(date_text).expect("a date") * DAY
}

/// Counts the microseconds from midnight to `HH:MM[:SS[.f…]]`, rounded to the nearest, up to 24:00.
pub fn time(text: &str) -> Option<i64> {
    let parts: Vec<&str> = text.split(':').collect();
    let (hours, minutes, seconds) = match parts[..] {
        [hours, minutes] => (hours, minutes, "00"),
        [hours, minutes, seconds] => (hours, minutes, seconds),
        _ => return None,
    };
    let (whole, fraction) = match seconds.split_once('.') {
        Some((_, "")) => return None,
        Some(parts) => parts,
        None => (seconds, ""),
    };
    let (hours, minutes, whole) = (digits(hours, 2)?, digits(minutes, 2)?, digits(whole, 2)?);
    if minutes > 59 || whole > 60 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // Half of a microsecond and more counts as one: whatever follows the seventh digit.
    let padded = format!("{fraction:0<7}");
    let tenths: i64 = padded[..7].parse().ok()?;
    let micros = hours * HOUR + minutes * MINUTE + whole * SECOND + (tenths + 5) / 10;
    (micros <= DAY).then_some(micros)
}

/// Reads a date and a time: the microseconds since 1970 on the clock, and how far it is ahead of UTC.
pub fn timestamp(text: &str) -> Option<(i64, i64)> {
    let (day, rest) = text.split_once(['T', 't', ' '])?;
    let clock_end = rest.find(['Z', 'z', '+', '-']).unwrap_or(rest.len());
    let (clock, offset) = rest.split_at(clock_end);
    let sign = if offset.starts_with('-') { -1 } else { 1 };
    let offset = match offset {
        "" | "Z" | "z" => 0,
        _ => {
            let zone = &offset[1..];
            let (hours, minutes) = match zone.split_once(':') {
                Some(parts) => parts,
                None if zone.len() == 2 => (zone, "00"),
                None => zone.split_at_checked(2)?,
            };
            let (hours, minutes) = (digits(hours, 2)?, digits(minutes, 2)?);
            if offset.starts_with(['Z', 'z']) || hours > 15 || minutes > 59 {
                return None;
            }
            sign * (hours * HOUR + minutes * MINUTE)
        }
    };
    Some((date(day)? * DAY + time(clock)?, offset))
}

fn days_of_year(year: i64) -> i64 {
    (1..=12).map(|month| days_of(year, month)).sum()
}

fn days_of(year: i64, month: i64) -> i64 {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 if is_leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Reads a number of exactly `length` digits.
fn digits(text: &str, length: usize) -> Option<i64> {
    let is_number = text.len() == length && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// Makes a date or time, often one at the edges of the calendar.
pub fn written(values: Type, random: &mut Rng) -> String {
    let year = random.choice([1, 1900, 1969, 1970, 2000, 2013, 2016, 9999]).unwrap_or(1970);
    let (month, day) = (random.u8(1..=12), random.choice([1, 28, 29, 30, 31]).unwrap_or(1));
    let date = format!("{year:04}-{month:02}-{day:02}");
    let hour = random.choice([0, 1, 12, 23, 24]).unwrap_or(0);
    let minute = random.choice([0, 30, 59]).unwrap_or(0);
    let mut time = format!("{hour:02}:{minute:02}");
    if random.u8(..4) > 0 {
        time.push_str(
            random
                .choice([":00", ":59", ":60", ":00.5", ":59.9999995", ":00.0000004999"])
                .unwrap_or(""),
        );
    }
    match values {
        Type::Date => date,
        Type::Time | Type::TimeOfDay => time,
        _ => {
            let zone = random
                .choice(["", "Z", "z", "+00", "+00:00", "-0030", "+15:59", "-15:00"])
                .unwrap_or("");
            let separator = random.choice(["T", " ", "t"]).unwrap_or("T");
            format!("{date}{separator}{time}{zone}")
        }
    }
}
