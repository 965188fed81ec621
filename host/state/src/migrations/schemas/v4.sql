-- Schema version 4, as commit d49bf23 of 2026-11-24 creates it.

CREATE TABLE shard (
    stream TEXT NOT NULL, shard TEXT NOT NULL,
    sequence TEXT, sub_sequence INTEGER, ended INTEGER NOT NULL DEFAULT 0,
    start_at_ms INTEGER, start_at_sequence TEXT, caught_up_ms INTEGER,
    PRIMARY KEY (stream, shard)) WITHOUT ROWID;
CREATE TABLE sink_position (
    sink TEXT NOT NULL, stream TEXT NOT NULL, shard TEXT NOT NULL,
    sequence TEXT NOT NULL, sub_sequence INTEGER NOT NULL,
    PRIMARY KEY (stream, shard, sink)) WITHOUT ROWID;
CREATE TABLE generation (id TEXT PRIMARY KEY, spec TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE component (digest TEXT PRIMARY KEY, bytes BLOB NOT NULL);
CREATE TABLE ledger (
    stream TEXT NOT NULL, shard TEXT NOT NULL, sequence TEXT NOT NULL,
    sub_sequence INTEGER NOT NULL, generation TEXT NOT NULL REFERENCES generation(id),
    recorded_ms INTEGER NOT NULL,
    PRIMARY KEY (stream, shard, sequence, sub_sequence)) WITHOUT ROWID;
CREATE TABLE dead_letter (
    stream TEXT NOT NULL, shard TEXT NOT NULL, sequence TEXT NOT NULL,
    sub_sequence INTEGER NOT NULL, place TEXT NOT NULL, output INTEGER NOT NULL,
    held INTEGER NOT NULL, partition_key BLOB NOT NULL, original BLOB NOT NULL,
    entered_key BLOB NOT NULL, entered BLOB NOT NULL, arrived_ms INTEGER NOT NULL,
    plugin TEXT NOT NULL, digest TEXT NOT NULL, reason TEXT NOT NULL,
    backtrace TEXT NOT NULL, written_ms INTEGER NOT NULL,
    PRIMARY KEY (stream, shard, sequence, sub_sequence, place, output));
ALTER TABLE dead_letter ADD COLUMN route TEXT NOT NULL DEFAULT '';
CREATE TABLE sink_owner (
    sink TEXT NOT NULL, stream TEXT NOT NULL, shard TEXT NOT NULL, epoch INTEGER NOT NULL,
    PRIMARY KEY (stream, shard, sink)) WITHOUT ROWID;
CREATE TABLE given_up (
    sink TEXT NOT NULL, stream TEXT NOT NULL, shard TEXT NOT NULL,
    sequence TEXT NOT NULL, sub_sequence INTEGER NOT NULL,
    PRIMARY KEY (stream, shard, sink, sequence, sub_sequence)) WITHOUT ROWID;
CREATE TABLE redrive (
    id INTEGER NOT NULL, ordinal INTEGER NOT NULL, letter INTEGER NOT NULL,
    PRIMARY KEY (id, ordinal)) WITHOUT ROWID;
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
