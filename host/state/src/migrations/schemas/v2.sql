-- Schema version 2, as commit e6508c1 of 2026-11-23 creates it.

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
