//! Results as JUnit XML, for build servers.

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

/// One result.
#[derive(Clone, Debug)]
pub struct JunitCase {
    /// Name of the test.
    pub name: String,
    /// `None`: passed. Otherwise the failure.
    pub failure: Option<String>,
}

/// Writes the results of one suite as an XML document.
///
/// # Errors
/// None in practice: it is written to memory.
pub fn document(suite: &str, cases: &[JunitCase]) -> std::io::Result<Vec<u8>> {
    let suite = writable(suite);
    let mut results = TestSuite::new(&suite);
    results.add_test_cases(cases.iter().map(|case| {
        let status = match &case.failure {
            None => TestCaseStatus::success(),
            Some(failure) => failed(&writable(failure)),
        };
        let mut result = TestCase::new(writable(&case.name), status);
        result.set_classname(&suite);
        result
    }));
    let mut report = Report::new(&suite);
    report.add_test_suite(results);
    let mut document = Vec::new();
    report.serialize(&mut document).map_err(std::io::Error::other)?;
    Ok(document)
}

fn failed(failure: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
    status.set_message(failure.lines().next().unwrap_or_default());
    status.set_description(failure);
    status
}

/// Removes characters that XML 1.0 cannot contain in any form, and other control characters.
///
/// The library itself keeps U+FFFE and U+FFFF. It removes whole terminal escape sequences, and one without an
/// end would take the rest of the text with it. Without the character that begins a sequence, everything stays
/// readable. The library also drops tabs, so they become spaces here.
fn writable(text: &str) -> String {
    let text = text.replace('\t', "    ");
    text.chars()
        .filter(|&c| c == '\n' || !(c.is_control() || matches!(c, '\u{FFFE}' | '\u{FFFF}')))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a character is valid in XML 1.0 (section 2.2, `Char`).
    fn is_of_xml(c: char) -> bool {
        matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{D7FF}' | '\u{E000}'..='\u{FFFD}' | '\u{10000}'..)
    }

    /// Writes one failure, and reads it back.
    fn write_and_read(name: &str, failure: &str) -> (Report, String) {
        let cases = [
            JunitCase { name: "fine".into(), failure: None },
            JunitCase { name: name.into(), failure: Some(failure.into()) },
        ];
        let xml = String::from_utf8(document("upper", &cases).unwrap()).unwrap();
        let strange = xml.chars().find(|c| !is_of_xml(*c));
        assert_eq!(strange, None, "{failure:?}: {xml}");
        (Report::deserialize_from_str(&xml).unwrap(), xml)
    }

    /// Returns the name, the message and the description of the failure.
    fn failure_of(report: &Report) -> [&str; 3] {
        let case = &report.test_suites[0].test_cases[1];
        let TestCaseStatus::NonSuccess { kind, message, description, .. } = &case.status else {
            panic!("a failure")
        };
        assert_eq!(*kind, NonSuccessKind::Failure);
        [&case.name, message.as_deref().unwrap(), description.as_deref().unwrap()]
    }

    #[test]
    fn the_document_is_the_one_that_build_servers_read() {
        let (_, xml) = write_and_read("a<b", "expected 1\nfound <2> & \"3\"");
        let expected = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="upper" tests="2" skipped="0" failures="1" errors="0">
    <testsuite name="upper" tests="2" skipped="0" errors="0" failures="1">
        <testcase name="fine" classname="upper"/>
        <testcase name="a&lt;b" classname="upper">
            <failure message="expected 1">expected 1
found &lt;2&gt; &amp; &quot;3&quot;</failure>
        </testcase>
    </testsuite>
</testsuites>
"#;
        assert_eq!(xml, expected);
    }

    #[test]
    fn whatever_a_plugin_says_is_xml() {
        // No text ends with a space: the library drops trailing spaces when it reads.
        for (failure, shown) in [
            ("a <b> & \"c\" 'd'\n]]> \u{1}.", "a <b> & \"c\" 'd'\n]]> ."),
            ("<![CDATA[ x ]]]]><![CDATA[>", "<![CDATA[ x ]]]]><![CDATA[>"),
            ("</failure></testcase><!-- &lt; &#0;", "</failure></testcase><!-- &lt; &#0;"),
            ("nul \0, escape \u{1b}[31mred\u{1b}[0m", "nul , escape [31mred[0m"),
            // Sequences without an end.
            ("\u{1b}]0;title and the rest", "]0;title and the rest"),
            ("\u{9b}31 and the rest", "31 and the rest"),
            ("\u{90}dcs and \u{1b}Pdcs and the rest", "dcs and Pdcs and the rest"),
            ("no characters \u{FFFE}\u{FFFF}.", "no characters ."),
            ("a\tb\r\nc \u{7f}\u{85}\u{2028}.", "a    b\nc \u{2028}."),
            (
                "\u{FEFF}\u{FDD0}\u{1FFFE}\u{10FFFF}\u{202e}",
                "\u{FEFF}\u{FDD0}\u{1FFFE}\u{10FFFF}\u{202e}",
            ),
        ] {
            let (report, xml) = write_and_read(failure, failure);
            let first = shown.lines().next().unwrap();
            assert_eq!(failure_of(&report), [shown, first, shown], "{xml}");
        }
    }

    #[test]
    fn every_character_is_written_or_left_out() {
        let all: String = ('\0'..='\u{FFFF}').map(|c| format!("{c}.")).collect();
        let (report, _) = write_and_read("all", &all);
        let [_, _, description] = failure_of(&report);
        assert_eq!(description, writable(&all));
    }
}
