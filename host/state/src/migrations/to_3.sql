-- Version 3, from 2: owners of shards, rows that were given up, and redrives.

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
