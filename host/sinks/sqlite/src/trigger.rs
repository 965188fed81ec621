//! Reads from the text of a trigger or a table which rows it refuses, for the warnings of `check`.
//!
//! SQLite has no query for this, so the SQL text is split into tokens. Only clear cases are decided; others become a
//! warning.

/// Effect of a trigger on the rows that a sink inserts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TriggerEffect {
    /// The trigger raises nothing when a row is inserted.
    TakesAll,
    /// The trigger raises an error for each row.
    RefusesAll,
    /// The trigger raises something for some rows; the text is the end of a warning about it.
    MayRefuse(&'static str),
}

/// Reads a `CREATE TRIGGER` statement.
pub(super) fn reading(sql: &str) -> TriggerEffect {
    let tokens = tokens(sql);
    let is = |token: &str, word: &str| token.eq_ignore_ascii_case(word);
    let (head, body) = parts(&tokens);
    let on_insert = head.iter().any(|token| is(token, "insert"));
    if on_insert && says(body, &["or", "rollback"]) {
        return TriggerEffect::MayRefuse(
            "rolls back whole transactions (OR ROLLBACK): a row that it refuses blocks its shard; use OR ABORT",
        );
    }
    let raises: Vec<usize> = (0..body.len())
        .filter(|at| is(&body[*at], "raise") && body.get(at + 1).is_some_and(|next| next == "("))
        .collect();
    let Some(first) = raises.first().filter(|_| on_insert) else { return TriggerEffect::TakesAll };
    let effect = |at: usize| body.get(at + 2).map_or("", String::as_str);
    let any = |word: &str| raises.iter().any(|at| is(effect(*at), word));
    // `BEGIN SELECT RAISE(ABORT, '...'); ...` without WHEN has no condition.
    let always = !head.iter().any(|token| is(token, "when"))
        && *first == 2
        && is(&body[1], "select")
        && !is(effect(*first), "ignore")
        && closed_at(body, first + 1)
            .is_some_and(|end| body.get(end + 1).is_some_and(|t| t == ";"));
    if always {
        TriggerEffect::RefusesAll
    } else if any("rollback") {
        TriggerEffect::MayRefuse(
            "rolls back whole transactions (RAISE(ROLLBACK)): a row that it refuses blocks its shard; \
             use RAISE(ABORT)",
        )
    } else if any("ignore") {
        TriggerEffect::MayRefuse(
            "silently drops rows (RAISE(IGNORE)): they do not become dead letters",
        )
    } else {
        TriggerEffect::MayRefuse("may refuse rows (RAISE): they become dead letters")
    }
}

/// Returns whether a `CREATE TABLE` statement has ON CONFLICT ROLLBACK. Then a row that violates the constraint makes
/// SQLite roll back the whole transaction.
///
/// Source: SQLite, "The ON CONFLICT Clause".
pub(super) fn rolls_back_conflicts(sql: &str) -> bool {
    says(&tokens(sql), &["on", "conflict", "rollback"])
}

/// Returns whether a trigger on INSERT mentions a table in its body, whatever it does there.
pub(super) fn names_on_insert(sql: &str, table: &str) -> bool {
    let tokens = tokens(sql);
    let (head, body) = parts(&tokens);
    let name = |token: &String| token.trim_matches(['"', '`', '[', ']']).to_owned();
    says(head, &["insert"]) && body.iter().any(|token| name(token).eq_ignore_ascii_case(table))
}

/// Splits the tokens of a trigger before its BEGIN.
fn parts(tokens: &[String]) -> (&[String], &[String]) {
    let begin = tokens.iter().position(|token| token.eq_ignore_ascii_case("begin"));
    tokens.split_at(begin.unwrap_or(tokens.len()))
}

/// Returns whether these words are in the text, one after the other.
fn says(tokens: &[String], words: &[&str]) -> bool {
    let is = |(token, word): (&String, &&str)| token.eq_ignore_ascii_case(word);
    tokens.windows(words.len()).any(|some| some.iter().zip(words).all(is))
}

/// Returns the index of the parenthesis that closes the one at `open`.
fn closed_at(tokens: &[String], open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token.as_str() {
            "(" => depth += 1,
            ")" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// Splits a statement into words and signs, without comments. Strings and quoted names are one token each.
fn tokens(sql: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = sql;
    while let Some(first) = rest.chars().next() {
        let end = match first {
            _ if rest.starts_with("--") => rest.find('\n').unwrap_or(rest.len()),
            _ if rest.starts_with("/*") => rest[2..].find("*/").map_or(rest.len(), |end| end + 4),
            '\'' | '"' | '`' => rest[1..].find(first).map_or(rest.len(), |end| end + 2),
            '[' => rest.find(']').map_or(rest.len(), |end| end + 1),
            _ if first.is_alphanumeric() || first == '_' => {
                rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
            }
            _ => first.len_utf8(),
        };
        let (token, after) = rest.split_at(end);
        let is_comment = token.starts_with("--") || token.starts_with("/*");
        if !first.is_whitespace() && !is_comment {
            tokens.push(token.to_owned());
        }
        rest = after;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_31_a_trigger_says_which_rows_it_refuses() {
        use TriggerEffect::{MayRefuse, RefusesAll, TakesAll};
        let kind = |sql: &str| reading(&format!("CREATE TRIGGER t {sql}"));
        for sql in [
            "AFTER INSERT ON a BEGIN INSERT INTO log VALUES (new.id); END",
            "BEFORE DELETE ON a BEGIN SELECT RAISE(ABORT, 'no'); END",
            "AFTER INSERT ON a BEGIN INSERT INTO log VALUES ('raise(abort)'); -- RAISE(ABORT, '')\n END",
        ] {
            assert_eq!(kind(sql), TakesAll, "{sql}");
        }
        for sql in [
            "BEFORE INSERT ON a BEGIN SELECT RAISE(ABORT, 'no'); END",
            "before insert on a begin /* ; */ select raise (fail, 'it''s (no)') ; end",
        ] {
            assert_eq!(kind(sql), RefusesAll, "{sql}");
        }
        for sql in [
            "BEFORE INSERT ON a WHEN new.id < 0 BEGIN SELECT RAISE(ABORT, 'no'); END",
            "BEFORE INSERT ON a BEGIN SELECT RAISE(ABORT, 'no') WHERE new.id < 0; END",
            "BEFORE INSERT ON a BEGIN SELECT CASE WHEN new.id < 0 THEN RAISE(FAIL, 'no') END; END",
            "BEFORE INSERT ON a BEGIN SELECT RAISE(IGNORE) WHERE new.id < 0; END",
            "BEFORE INSERT ON a BEGIN SELECT RAISE(ROLLBACK, 'no') WHERE new.id < 0; END",
        ] {
            assert!(matches!(kind(sql), MayRefuse(_)), "{sql}");
        }
    }

    #[test]
    fn fault_31_a_table_says_which_conflicts_end_the_transaction() {
        for sql in [
            "CREATE TABLE t (id INTEGER UNIQUE ON CONFLICT ROLLBACK)",
            "create table t (id integer, unique (id) on /* all */ conflict\n rollback)",
            "CREATE TABLE t (id INTEGER PRIMARY KEY, n TEXT NOT NULL ON CONFLICT ROLLBACK)",
        ] {
            assert!(rolls_back_conflicts(sql), "{sql}");
        }
        for sql in [
            "CREATE TABLE t (id INTEGER UNIQUE ON CONFLICT ABORT)",
            "CREATE TABLE t (id INTEGER UNIQUE) -- ON CONFLICT ROLLBACK",
            "CREATE TABLE t (id TEXT UNIQUE DEFAULT 'ON CONFLICT ROLLBACK')",
            "CREATE TABLE t (\"on conflict rollback\" INTEGER)",
        ] {
            assert!(!rolls_back_conflicts(sql), "{sql}");
        }
    }

    #[test]
    fn fault_31_a_trigger_says_which_tables_it_has_to_do_with() {
        let audit =
            "CREATE TRIGGER t AFTER INSERT ON a BEGIN INSERT INTO \"Audit\" VALUES (new.id); END";
        assert!(names_on_insert(audit, "audit"));
        assert!(!names_on_insert(audit, "a"), "a row is in it already");
        assert!(!names_on_insert(&audit.replace("AFTER INSERT", "AFTER DELETE"), "audit"));
        let text = "CREATE TRIGGER t AFTER INSERT ON a BEGIN INSERT INTO b VALUES ('audit'); END";
        assert!(!names_on_insert(text, "audit"));
        let rolls = "CREATE TRIGGER t AFTER INSERT ON a BEGIN INSERT OR ROLLBACK INTO b VALUES (new.id); END";
        assert!(
            matches!(reading(rolls), TriggerEffect::MayRefuse(effect) if effect.contains("OR ABORT"))
        );
    }
}
