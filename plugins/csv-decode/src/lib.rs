//! Decodes CSV lines to JSON rows with typed columns.
//!
//! | | |
//! |---|---|
//! | accepts | `text/csv`: one line per record, with or without its line end |
//! | route | `application/json`; its name is `route`, by default `rows` |
//! | columns | as configured |
//! | configuration | [`Config`] |
//!
//! ```toml
//! [stage.config]
//! skip_header_line = "year,origin,time_hour"
//! null = ["NA", ""]
//! columns = [
//!     { name = "year", type = "integer", nullable = false },
//!     { name = "origin", type = "text" },
//!     { name = "time_hour", type = "timestamptz" },
//! ]
//! ```
//!
//! turns `2013,EWR,2013-01-01T10:00:00Z` into
//! `{"year":2013,"origin":"EWR","time_hour":"2013-01-01T10:00:00Z"}`. A line that does not match its columns is
//! rejected, with the column and the value in the reason.

mod plain;
mod value;

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};
use serde::Deserialize;
use shardmill_sdk::{Context, Descriptor, Emitter, Error, Plugin, Record, Route, Writer};

use plain::Plain;
pub use value::ColumnType;

const ROUTE_ROWS: u32 = 0;
/// Some editors and spreadsheets write it before the first line of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Configuration of the decoder.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The columns, in the order of the line; at least one.
    columns: Vec<ColumnConfig>,
    /// Field texts that stand for null. By default the empty field.
    #[serde(default = "empty_is_null")]
    null: Vec<String>,
    /// A line to filter: the header, exactly as written in the file.
    skip_header_line: Option<String>,
    /// Separator of fields: one ASCII character. By default a comma.
    #[serde(default = "comma")]
    delimiter: char,
    /// Name of the route.
    #[serde(default = "rows")]
    route: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ColumnConfig {
    name: String,
    #[serde(rename = "type")]
    column_type: ColumnType,
    #[serde(default = "yes")]
    nullable: bool,
}

/// Decodes lines according to a configuration.
pub struct Decoder {
    columns: Vec<Column>,
    null: Vec<String>,
    header: Option<String>,
    delimiter: u8,
    plain: Option<Plain>,
    reader: Reader,
    /// The fields of a line with quotes, unquoted and joined.
    unquoted: Vec<u8>,
    /// End of each field of the current line.
    ends: Vec<usize>,
}

struct Column {
    name: String,
    column_type: ColumnType,
    nullable: bool,
    /// `"name":`, with the separator before it.
    row_key: String,
}

/// Result for a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded {
    /// A row was written.
    Row,
    /// The line is the header.
    Header,
}

impl Decoder {
    /// Prepares a configuration.
    ///
    /// # Errors
    ///
    /// There is no column, two columns have the same name, or the delimiter is not ASCII.
    pub fn new(config: Config) -> Result<Self, Error> {
        let delimiter = u8::try_from(config.delimiter)
            .ok()
            .filter(u8::is_ascii)
            .filter(|byte| !matches!(byte, b'"' | b'\r' | b'\n'))
            .ok_or_else(|| Error::reject("config.delimiter: expected one ASCII character"))?;
        let mut columns: Vec<Column> = Vec::with_capacity(config.columns.len());
        let mut separator = '{';
        for ColumnConfig { name, column_type, nullable } in config.columns {
            if columns.iter().any(|column| column.name == name) {
                return Err(Error::reject(format_args!("config.columns: `{name}` is there twice")));
            }
            let row_key = format!("{separator}{}:", serde_json::to_string(&name)?);
            if column_type != ColumnType::Skip {
                separator = ',';
            }
            columns.push(Column { name, column_type, nullable, row_key });
        }
        if separator == '{' {
            return Err(Error::reject("config.columns: expected at least one column"));
        }
        // One more than needed, to distinguish a longer line from a matching one.
        let ends = vec![0; columns.len() + 1];
        let reader = ReaderBuilder::new().delimiter(delimiter).build();
        let header = config.skip_header_line;
        let (null, unquoted) = (config.null, Vec::new());
        let plain = Plain::new(delimiter, &null);
        Ok(Self { columns, null, header, delimiter, plain, reader, unquoted, ends })
    }

    /// Decodes one line and writes its row. This is all of the plugin's work on a record.
    ///
    /// # Errors
    ///
    /// The line does not match the columns. Part of a row may have been written.
    pub fn write_row(&mut self, line: &[u8], row: &mut Writer<'_>) -> Result<Decoded, Error> {
        let line = trim_line_end(line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line));
        if self.header.as_deref().is_some_and(|header| header.as_bytes() == line) {
            return Ok(Decoded::Header);
        }
        if let Some(plain) = self.plain.filter(|_| !line.is_empty()) {
            let begun = row.written();
            if self.write_plain(plain, line, row) {
                return Ok(Decoded::Row);
            }
            row.take_back(begun);
        }
        let (fields, gap) = if self.split_plain(line) {
            (line, 1)
        } else {
            let length = self.split(line)?;
            (&self.unquoted[..length], 0)
        };
        let fields = std::str::from_utf8(fields)?;
        let mut start = 0;
        for (column, end) in self.columns.iter().zip(&self.ends) {
            // None if a character begins in one field and ends in the next.
            let field = fields.get(start..*end);
            start = *end + gap;
            if column.column_type == ColumnType::Skip {
                continue;
            }
            row.append(&column.row_key);
            let written = match field {
                None => Err(Error::reject("invalid utf-8")),
                Some(field) if self.null.iter().any(|null| null == field) => column.write_null(row),
                Some(field) => column.column_type.write(field, row),
            };
            written.map_err(|error| error.context(format_args!("column `{}`", column.name)))?;
        }
        row.append(b"}");
        Ok(Decoded::Row)
    }

    /// Finds the ends of a line's fields, many bytes at a time, if the line has no quotes and as many fields as
    /// columns. Nearly all lines are like this.
    fn split_plain(&mut self, line: &[u8]) -> bool {
        if line.is_empty() || memchr::memchr3(b'"', b'\r', b'\n', line).is_some() {
            return false;
        }
        let last = self.columns.len() - 1;
        let mut found = 0;
        for end in memchr::memchr_iter(self.delimiter, line) {
            if found == last {
                return false;
            }
            self.ends[found] = end;
            found += 1;
        }
        self.ends[last] = line.len();
        found == last
    }

    /// Splits any line, byte by byte, into `unquoted` and `ends`. On success there are as many fields as
    /// columns. Returns the length of all fields together.
    fn split(&mut self, line: &[u8]) -> Result<usize, Error> {
        if ends_within_quotes(line, self.delimiter) {
            return Err(Error::reject(
                "the record ends within quotes: a quoted line break was cut off, or a quote is missing; put \
                 the file with `stream put --format csv`, or read it with `format = \"text/csv\"`",
            ));
        }
        self.reader.reset();
        // Unquoting only shortens a field.
        if self.unquoted.len() < line.len() {
            self.unquoted.resize(line.len(), 0);
        }
        let (mut result, read, written, mut found) =
            self.reader.read_record(line, &mut self.unquoted, &mut self.ends);
        if result == ReadRecordResult::InputEmpty {
            // The line has no line end; an empty input marks the end.
            let (end, _, _, more) = self.reader.read_record(
                &[],
                &mut self.unquoted[written..],
                &mut self.ends[found..],
            );
            (result, found) = (end, found + more);
        }
        let expected = self.columns.len();
        match result {
            ReadRecordResult::Record if read < line.len() => {
                Err(Error::reject("expected a single line, found another line after it"))
            }
            ReadRecordResult::Record if found == expected => Ok(self.ends[expected - 1]),
            ReadRecordResult::Record => {
                Err(Error::reject(format_args!("expected {expected} fields, found {found}")))
            }
            ReadRecordResult::End => Err(Error::reject("expected fields, found an empty line")),
            _ => Err(Error::reject(format_args!("expected {expected} fields, found more"))),
        }
    }
}

impl Column {
    fn write_null(&self, row: &mut Writer<'_>) -> Result<(), Error> {
        if !self.nullable {
            return Err(Error::reject("expected a value, found null"));
        }
        row.append(b"null");
        Ok(())
    }
}

impl Plugin for Decoder {
    type Config = Config;

    fn configure(config: Config, _: &Context) -> Result<(Self, Descriptor), Error> {
        let mut rows = Route::new(&config.route, "application/json");
        for column in &config.columns {
            let name = &column.name;
            match (column.column_type.sql_name(), column.nullable) {
                (None, _) => {}
                (Some(sql_name), true) => rows = rows.nullable_column(name, sql_name),
                (Some(sql_name), false) => rows = rows.column(name, sql_name),
            }
        }
        let descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .accepts("text/csv")
            .route(rows);
        Ok((Self::new(config)?, descriptor))
    }

    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        out.emit_if(ROUTE_ROWS, |row| Ok(self.write_row(record.payload(), row)? == Decoded::Row))
    }
}

shardmill_sdk::export!(Decoder);

/// Whether a quoted field is still open at the end. The reader would treat it as closed, and so make a row that
/// was never in the file.
fn ends_within_quotes(line: &[u8], delimiter: u8) -> bool {
    let (mut within, mut field_begins) = (false, true);
    let mut at = 0;
    while at < line.len() {
        match line[at] {
            b'"' if within && line.get(at + 1) == Some(&b'"') => at += 1,
            b'"' if within => within = false,
            b'"' if field_begins => within = true,
            _ => {}
        }
        field_begins = !within && line[at] == delimiter;
        at += 1;
    }
    within
}

fn trim_line_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

fn empty_is_null() -> Vec<String> {
    vec![String::new()]
}

fn comma() -> char {
    ','
}

fn rows() -> String {
    "rows".into()
}

fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use shardmill_sdk::testing::{Fate, Harness};

    use super::*;

    /// Returns the row, `-` if filtered, or the reason.
    fn decode(config: &str, line: &[u8]) -> String {
        match Harness::<Decoder>::new(config).unwrap().run_one(line) {
            Fate::Delivered(outputs) => String::from_utf8(outputs[0].payload.clone()).unwrap(),
            Fate::Filtered => "-".into(),
            Fate::Rejected(reason) => reason,
        }
    }

    fn value(column_type: &str, field: &str) -> String {
        let config = format!(r#"{{"columns":[{{"name":"a","type":"{column_type}"}}]}}"#);
        let row = decode(&config, field.as_bytes());
        match row.strip_prefix("{\"a\":").and_then(|row| row.strip_suffix('}')) {
            Some(value) => value.into(),
            None => row,
        }
    }

    const FLIGHT: &str = r#"{"null":["NA",""],"skip_header_line":"year,delay,origin,time",
        "columns":[{"name":"year","type":"integer","nullable":false},
        {"name":"delay","type":"smallint"},{"name":"origin","type":"text"},
        {"name":"time","type":"timestamptz"}]}"#;

    #[test]
    fn a_line_becomes_a_row() {
        let row = r#"{"year":2013,"delay":-7,"origin":"EWR","time":"2013-01-01T10:00:00Z"}"#;
        assert_eq!(decode(FLIGHT, b"2013,-7,EWR,2013-01-01T10:00:00Z"), row);
        assert_eq!(decode(FLIGHT, b"2013,-7,EWR,2013-01-01T10:00:00Z\r\n"), row);
        assert_eq!(decode(FLIGHT, b"2013,-7,\"EWR\",2013-01-01 10:00:00"), row);
        assert_eq!(
            decode(FLIGHT, b"2013,NA,,NA"),
            r#"{"year":2013,"delay":null,"origin":null,"time":null}"#
        );
        assert_eq!(
            decode(FLIGHT, b"2013,,\"a \"\"b\"\",\n\xc3\xa9\",NA"),
            "{\"year\":2013,\"delay\":null,\"origin\":\"a \\\"b\\\",\\n\u{e9}\",\"time\":null}"
        );
    }

    #[test]
    fn the_header_is_filtered() {
        assert_eq!(decode(FLIGHT, b"year,delay,origin,time\n"), "-");
    }

    #[test]
    fn what_does_not_fit_is_rejected() {
        let cases: [(&[u8], &str); 10] = [
            (b"", "expected fields, found an empty line"),
            (b"\n", "expected fields, found an empty line"),
            (b"2013,1,EWR", "expected 4 fields, found 3"),
            (b"2013,1,EWR,NA,5", "expected 4 fields, found 5"),
            (b"2013,1,EWR,NA,5,6,7", "expected 4 fields, found more"),
            (
                b"2013,1,EWR,NA\n2013,1,EWR,NA",
                "expected a single line, found another line after it",
            ),
            (b"NA,1,EWR,NA", "column `year`: expected a value, found null"),
            (b"2013,late,EWR,NA", "column `delay`: invalid smallint `late`"),
            (b"2013,1,\xff,NA", "invalid utf-8 sequence of 1 bytes from index 7"),
            (b"2013,1,\"\xc3\",\xa9", "column `origin`: invalid utf-8"),
        ];
        for (line, reason) in cases {
            assert_eq!(decode(FLIGHT, line), reason, "{line:?}");
        }
    }

    #[test]
    fn a_rejected_line_does_not_spoil_the_next() {
        let mut plugin = Harness::<Decoder>::new(FLIGHT).unwrap();
        let good: &[u8] = b"2013,1,EWR,NA";
        let fates = plugin.run(&[good, b"\"2013,1", b"1,2,3,4,5,6", b"2013,x,E,NA", good]).unwrap();
        assert_eq!(fates[0], fates[4]);
        assert!(fates[1..4].iter().all(|fate| matches!(fate, Fate::Rejected(_))), "{fates:?}");
    }

    #[test]
    fn each_type() {
        assert_eq!(value("smallint", "-32768"), "-32768");
        assert_eq!(value("smallint", "32768"), "column `a`: invalid smallint `32768`");
        assert_eq!(value("integer", "007"), "7");
        assert_eq!(value("integer", "2147483648"), "column `a`: invalid integer `2147483648`");
        assert_eq!(value("bigint", "9223372036854775807"), "9223372036854775807");
        assert_eq!(value("bigint", " 1"), "column `a`: invalid bigint ` 1`");
        let exact = "-12345678901234567890.10";
        assert_eq!(value("numeric", exact), exact);
        assert_eq!(value("numeric", "+00.50"), "0.50");
        assert_eq!(value("numeric", ".5"), "0.5");
        assert_eq!(value("numeric", "-5."), "-5");
        assert_eq!(value("numeric", "0"), "0");
        for wrong in ["1e5", "--1", ".", "-", "1.2.3", "NaN", "1,5"] {
            let field = format!("\"{wrong}\"");
            assert_eq!(value("numeric", &field), format!("column `a`: invalid numeric `{wrong}`"));
        }
        assert_eq!(value("double precision", "1e5"), "100000.0");
        assert_eq!(value("double precision", "inf"), "column `a`: invalid double precision `inf`");
        assert_eq!(value("boolean", "t"), "true");
        assert_eq!(value("boolean", "FALSE"), "false");
        assert_eq!(value("boolean", "2"), "column `a`: invalid boolean `2`");
        assert_eq!(value("text", "7"), "\"7\"");
        assert_eq!(value("date", "2013-02-28"), "\"2013-02-28\"");
        assert_eq!(value("date", "2013-02-29"), "column `a`: invalid date `2013-02-29`");
        assert_eq!(value("timestamp", "2013-01-01 10:00:00.5"), "\"2013-01-01T10:00:00.5\"");
        assert_eq!(
            value("timestamptz", "2013-01-01T10:00:00+05:30"),
            "\"2013-01-01T10:00:00+05:30\""
        );
        assert_eq!(value("timestamptz", "2012-02-29 23:59:60Z"), "\"2012-02-29T23:59:60Z\"");
        for wrong in [
            "yesterday",
            "2013-02-29T10:00:00Z",
            "2013-01-01T24:00:00Z",
            "2013-01-01T10:60:00Z",
            "2013-01-01T10:00:61Z",
            "2013-01-01T10:00:00.Z",
            "2013-01-01T10:00:00.1234567890Z",
            "2013-01-01T10:00:00+24:00",
            "2013-01-01T10:00:00+0530",
            "2013-01-01T10:00Z",
            "2013-01-01_10:00:00Z",
            "2013-1-1T10:00:00Z",
            "\u{e9}013-01-1T10:00:00Z",
        ] {
            let reason = format!("column `a`: invalid timestamptz `{wrong}`");
            assert_eq!(value("timestamptz", wrong), reason);
        }
    }

    #[test]
    fn plain_lines_become_what_any_line_does() {
        let config = r#"{"null":["NA",""],"columns":[{"name":"a","type":"bigint"},
            {"name":"b","type":"text","nullable":false},{"name":"c","type":"skip"},
            {"name":"d","type":"smallint"},{"name":"e","type":"numeric"},
            {"name":"f","type":"boolean"}]}"#;
        let values = [
            "",
            "NA",
            "0",
            "-0",
            "7",
            "-12",
            "007",
            "1234",
            "32767",
            "99999",
            "1.50",
            "t",
            "Honda",
            "a b",
            "\u{e9}",
            "\"q\"",
            "b\\",
            "123456789012345678",
            "9223372036854775808",
            "x,y",
            "\u{1}",
        ];
        let mut random = shardmill_sdk::Rng::with_seed(2014);
        let (mut rows, mut total) = (0, 0);
        // One decoder for all lines, as in an instance: parsing the configuration takes longer than a line.
        let mut decoders = [true, false].map(|plain| {
            let mut decoder = Decoder::new(serde_json::from_str(config).unwrap()).unwrap();
            decoder.plain = decoder.plain.filter(|_| plain);
            decoder
        });
        for _ in 0..50_000 {
            let fields = if random.u8(..20) == 0 { random.usize(..8) } else { 6 };
            let good = [&values[..], &["12", "Honda", "x", "3", "1.5", "t"]];
            let field = |place: usize| match random.u8(..4) {
                0 => values[random.usize(..values.len())],
                _ => good[1][place % 6],
            };
            let line: Vec<&str> = (0..fields).map(field).collect();
            let line = line.join(",");
            let [plain, any] = decoders.each_mut().map(|decoder| {
                let mut row = Vec::new();
                let decoded = decoder.write_row(line.as_bytes(), &mut Writer::new(&mut row));
                decoded.map(|_| String::from_utf8(row).unwrap()).map_err(|error| error.to_string())
            });
            assert_eq!(plain, any, "{line}");
            total += 1;
            rows += usize::from(plain.is_ok());
        }
        assert!(rows * 10 > total, "{rows} of {total}");
    }

    #[test]
    fn columns_can_be_skipped() {
        let config = r#"{"columns":[{"name":"a","type":"skip"},{"name":"b","type":"text"},
            {"name":"c","type":"skip"},{"name":"d","type":"text"}],"delimiter":"|","route":"r"}"#;
        assert_eq!(decode(config, b"1|2|3|4"), r#"{"b":"2","d":"4"}"#);
        let plugin = Harness::<Decoder>::new(config).unwrap();
        let route = &plugin.descriptor().routes[0];
        let names: Vec<_> = route.columns.iter().map(|column| column.name.as_str()).collect();
        assert_eq!((route.name.as_str(), names.as_slice()), ("r", ["b", "d"].as_slice()));
    }

    #[test]
    fn a_wrong_configuration_is_refused() {
        let refusal = |config: &str| Harness::<Decoder>::new(config).err().unwrap();
        assert_eq!(refusal(r#"{"columns":[]}"#), "config.columns: expected at least one column");
        let twice = r#"{"columns":[{"name":"a","type":"text"},{"name":"a","type":"text"}]}"#;
        assert_eq!(refusal(twice), "config.columns: `a` is there twice");
        let unknown = refusal(r#"{"columns":[{"name":"a","type":"varchar"}]}"#);
        assert!(unknown.starts_with("config.columns[0].type: unknown variant"), "{unknown}");
        let delimiter = r#"{"columns":[{"name":"a","type":"text"}],"delimiter":"\n"}"#;
        assert_eq!(refusal(delimiter), "config.delimiter: expected one ASCII character");
    }
}
