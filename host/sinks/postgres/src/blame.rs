//! Decides by its SQLSTATE whether an error is the fault of a row, of the sink, or of either.
//!
//! Source: PostgreSQL, appendix "PostgreSQL Error Codes".

use tokio_postgres::error::Severity;

use shardmill_pg::ServerError;

/// Who can have caused an error while rows were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blame {
    /// A row: it is refused if it fails alone.
    Row,
    /// A row, or the table with its triggers and constraints. A row is refused only if it fails alone while another row
    /// is accepted.
    Either,
    /// The server, the connection, the table or its triggers. No row is refused.
    Sink,
}

/// Classes that never blame a row: connection, transaction state, authorisation, database, transaction rollback
/// (serialisation, deadlock), resources, operator, system, internal.
const SINK_CLASSES: [&str; 9] = ["08", "25", "28", "3D", "40", "53", "57", "58", "XX"];

/// Lock not available; missing table; missing column.
const SINK_CODES: [&str; 3] = ["55P03", "42P01", "42703"];

/// Data exception and integrity constraint.
const ROW_CLASSES: [&str; 2] = ["22", "23"];

/// A trigger's `RAISE EXCEPTION`; and a value that is too large for its index or page, or nested too deep. Without the
/// latter two, such a row would block its shard forever.
const ROW_CODES: [&str; 3] = ["P0001", "54000", "54001"];

/// All codes of PostgreSQL itself. Any other code comes from user code.
const APPENDIX: &str = "\
    00000 01000 01003 01004 01006 01007 01008 0100C 01P01 02000 02001 03000 08000 08001 08003 \
    08004 08006 08007 08P01 09000 0A000 0B000 0F000 0F001 0L000 0LP01 0P000 0Z000 0Z002 10608 \
    20000 21000 22000 22001 22002 22003 22004 22005 22007 22008 22009 2200B 2200C 2200D 2200F \
    2200G 2200H 2200L 2200M 2200N 2200S 2200T 22010 22011 22012 22013 22014 22015 22016 22018 \
    22019 2201B 2201E 2201F 2201G 2201W 2201X 22021 22022 22023 22024 22025 22026 22027 2202E \
    2202G 2202H 22030 22031 22032 22033 22034 22035 22036 22037 22038 22039 2203A 2203B 2203C \
    2203D 2203E 2203F 2203G 22P01 22P02 22P03 22P04 22P05 22P06 23000 23001 23502 23503 23505 \
    23514 23P01 24000 25000 25001 25002 25003 25004 25005 25006 25007 25008 25P01 25P02 25P03 \
    25P04 26000 27000 28000 28P01 2B000 2BP01 2D000 2F000 2F002 2F003 2F004 2F005 34000 38000 \
    38001 38002 38003 38004 39000 39001 39004 39P01 39P02 39P03 3B000 3B001 3D000 3F000 40000 \
    40001 40002 40003 40P01 42000 42501 42601 42602 42611 42622 42701 42702 42703 42704 42710 \
    42712 42723 42725 42803 42804 42809 42830 42846 42883 428C9 42939 42P01 42P02 42P03 42P04 \
    42P05 42P06 42P07 42P08 42P09 42P10 42P11 42P12 42P13 42P14 42P15 42P16 42P17 42P18 42P19 \
    42P20 42P21 42P22 44000 53000 53100 53200 53300 53400 54000 54001 54011 54023 55000 55006 \
    55P02 55P03 55P04 57000 57014 57P01 57P02 57P03 57P04 57P05 58000 58030 58P01 58P02 72000 \
    F0000 F0001 HV000 HV001 HV002 HV004 HV005 HV006 HV007 HV008 HV009 HV00A HV00B HV00C HV00D \
    HV00J HV00K HV00L HV00M HV00N HV00P HV00Q HV00R HV010 HV014 HV021 HV024 HV090 HV091 P0000 \
    P0001 P0002 P0003 P0004 XX000 XX001 XX002";

impl Blame {
    /// Classifies an error.
    pub(super) fn of(error: &ServerError) -> Self {
        match error.as_db_error() {
            Some(said) if said.parsed_severity() != Some(Severity::Fatal) => {
                Self::by_code(said.code().code())
            }
            _ => Self::Sink,
        }
    }

    /// Classifies an SQLSTATE.
    fn by_code(code: &str) -> Self {
        let class = code.get(..2).unwrap_or(code);
        if SINK_CLASSES.contains(&class) || SINK_CODES.contains(&code) {
            return Self::Sink;
        }
        let is_known = APPENDIX.split(' ').any(|known| known == code);
        let blames_row = ROW_CLASSES.contains(&class) || ROW_CODES.contains(&code) || !is_known;
        if blames_row { Self::Row } else { Self::Either }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_08_codes_of_user_code_blame_the_row_and_those_of_the_server_never_do() {
        for (code, blame) in [
            ("22001", Blame::Row),
            ("23505", Blame::Row),
            ("P0001", Blame::Row),
            ("54000", Blame::Row),
            // Only triggers raise these.
            ("CAR01", Blame::Row),
            ("U0001", Blame::Row),
            ("99999", Blame::Row),
            ("P0002", Blame::Either),
            ("P0004", Blame::Either),
            ("42501", Blame::Either),
            ("42883", Blame::Either),
            ("55000", Blame::Either),
            ("0A000", Blame::Either),
            ("21000", Blame::Either),
            ("38000", Blame::Either),
            ("08006", Blame::Sink),
            ("25006", Blame::Sink),
            ("25P04", Blame::Sink),
            ("28000", Blame::Sink),
            ("3D000", Blame::Sink),
            ("40001", Blame::Sink),
            ("40P01", Blame::Sink),
            ("53100", Blame::Sink),
            ("55P03", Blame::Sink),
            ("57014", Blame::Sink),
            ("57P01", Blame::Sink),
            ("58030", Blame::Sink),
            ("XX000", Blame::Sink),
            ("42P01", Blame::Sink),
            ("42703", Blame::Sink),
            // User code chose a code in a class of the server.
            ("53ABC", Blame::Sink),
        ] {
            assert_eq!(Blame::by_code(code), blame, "{code}");
        }
    }
}
