-- Version 4, from 3: dead letters in the order in which they became visible.

CREATE TABLE letter_log (
    number INTEGER PRIMARY KEY AUTOINCREMENT, letter INTEGER NOT NULL);
CREATE INDEX letter_log_letter ON letter_log (letter);
INSERT INTO letter_log (letter)
    SELECT rowid FROM dead_letter WHERE held = 0 ORDER BY written_ms, rowid;
CREATE TABLE letter_log_stream (created_ms INTEGER NOT NULL);
INSERT INTO letter_log_stream VALUES (CAST(unixepoch('subsec') * 1000 AS INTEGER));
CREATE TRIGGER letter_written AFTER INSERT ON dead_letter WHEN NEW.held = 0
    BEGIN INSERT INTO letter_log (letter) VALUES (NEW.rowid); END;
CREATE TRIGGER letter_shown AFTER UPDATE OF held ON dead_letter
    WHEN NEW.held = 0 AND OLD.held <> 0
    BEGIN INSERT INTO letter_log (letter) VALUES (NEW.rowid); END;
CREATE TRIGGER letter_deleted AFTER DELETE ON dead_letter
    BEGIN DELETE FROM letter_log WHERE letter = OLD.rowid; END;
