//! Results as JUnit XML, which build servers read.
//!
//! Source: the schema that Jenkins' JUnit plugin publishes.

use quick_xml::Writer;
use quick_xml::events::{BytesCData, BytesDecl, BytesEnd, BytesStart, Event};

/// One result.
#[derive(Clone, Debug)]
pub struct JunitCase {
    /// Its name.
    pub name: String,
    /// `None`: passed. Else what was wrong.
    pub failure: Option<String>,
}

/// The results of one suite as an XML document.
///
/// # Errors
/// None in practice: it is written to memory.
pub fn document(suite: &str, cases: &[JunitCase]) -> std::io::Result<Vec<u8>> {
    let mut xml = Writer::new_with_indent(Vec::new(), b' ', 2);
    let failures = cases.iter().filter(|case| case.failure.is_some()).count();
    xml.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let mut start = BytesStart::new("testsuite");
    start.push_attribute(("name", suite));
    start.push_attribute(("tests", cases.len().to_string().as_str()));
    start.push_attribute(("failures", failures.to_string().as_str()));
    xml.write_event(Event::Start(start))?;
    for case in cases {
        let mut start = BytesStart::new("testcase");
        start.push_attribute(("classname", suite));
        start.push_attribute(("name", case.name.as_str()));
        let Some(failure) = &case.failure else {
            xml.write_event(Event::Empty(start))?;
            continue;
        };
        xml.write_event(Event::Start(start))?;
        let mut start = BytesStart::new("failure");
        start.push_attribute(("message", failure.lines().next().unwrap_or_default()));
        xml.write_event(Event::Start(start))?;
        // XML has no way to write most control characters.
        let shown: String =
            failure.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
        for part in BytesCData::escaped(&shown) {
            xml.write_event(Event::CData(part))?;
        }
        xml.write_event(Event::End(BytesEnd::new("failure")))?;
        xml.write_event(Event::End(BytesEnd::new("testcase")))?;
    }
    xml.write_event(Event::End(BytesEnd::new("testsuite")))?;
    Ok(xml.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_plugin_says_is_xml() {
        let failure = "a <b> & \"c\"\n]]> \u{1}".to_owned();
        let cases = [
            JunitCase { name: "fine".into(), failure: None },
            JunitCase { name: "a<b".into(), failure: Some(failure) },
        ];
        let xml = String::from_utf8(document("upper", &cases).unwrap()).unwrap();
        assert!(xml.contains("tests=\"2\" failures=\"1\""), "{xml}");
        assert!(xml.contains("name=\"a&lt;b\"") && !xml.contains('\u{1}'), "{xml}");
        let mut reader = quick_xml::Reader::from_str(&xml);
        while !matches!(reader.read_event().unwrap(), Event::Eof) {}
    }
}
