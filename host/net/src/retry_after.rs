//! `Retry-After`: the pause that a server asks for.

use std::time::{Duration, SystemTime};

/// Longest pause. A server error must not stop a shard for a day.
const PAUSE_MAX: Duration = Duration::from_secs(600);

/// Parses a `Retry-After`: seconds, or a date. A date counts from the `Date` of the same answer, so that neither clock
/// must be right; without a `Date`, from the clock of this machine.
pub(super) fn pause(retry_after: &str, date: Option<&str>) -> Option<Duration> {
    let text = retry_after.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number with too many digits is longer than the longest pause, too.
        let seconds = text.parse().map_or(PAUSE_MAX, Duration::from_secs);
        return Some(seconds.min(PAUSE_MAX));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    let now = date.and_then(|date| httpdate::parse_http_date(date.trim()).ok());
    let pause = at.duration_since(now.unwrap_or_else(SystemTime::now)).unwrap_or_default();
    Some(pause.min(PAUSE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_27_both_forms_of_retry_after_are_read() {
        let date = Some("Sun, 06 Nov 1994 08:49:37 GMT");
        for (text, seconds) in [
            ("0", Some(0)),
            (" 7 ", Some(7)),
            ("600", Some(600)),
            ("86400", Some(600)),
            ("99999999999999999999999", Some(600)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sunday, 06-Nov-94 08:50:37 GMT", Some(60)),
            ("Sun Nov  6 08:50:37 1994", Some(60)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("Mon, 07 Nov 1994 08:49:37 GMT", Some(600)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
        ] {
            assert_eq!(pause(text, date), seconds.map(Duration::from_secs), "{text}");
        }
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        let pause = pause(&later, None).expect("a date");
        assert!((95..=100).contains(&pause.as_secs()), "{pause:?}");
    }
}
