-- Version 6, from 5.

-- Holes. An empty sequence is the beginning of the shard as `from` and its end as `to`; an empty sink means
-- every sink.
CREATE TABLE hole (
    number INTEGER PRIMARY KEY AUTOINCREMENT, sink TEXT NOT NULL,
    stream TEXT NOT NULL, shard TEXT NOT NULL,
    from_sequence TEXT NOT NULL, from_sub INTEGER NOT NULL,
    to_sequence TEXT NOT NULL, to_sub INTEGER NOT NULL,
    why TEXT NOT NULL, recorded_ms INTEGER NOT NULL, filled_ms INTEGER,
    UNIQUE (stream, shard, sink, from_sequence, from_sub, to_sequence, to_sub));

-- Where each sink's rows went, and sinks that were removed. An empty destination: rows go to nowhere that lasts.
-- `removed_ms`: since when the sink is missing from the configuration. An empty sequence: the sink had nothing of
-- the shard.
CREATE TABLE sink_known (
    sink TEXT PRIMARY KEY, destination TEXT NOT NULL, noted_ms INTEGER NOT NULL,
    removed_ms INTEGER) WITHOUT ROWID;
CREATE TABLE sink_removed (
    sink TEXT NOT NULL, stream TEXT NOT NULL, shard TEXT NOT NULL,
    sequence TEXT NOT NULL, sub_sequence INTEGER NOT NULL, removed_ms INTEGER NOT NULL,
    PRIMARY KEY (stream, shard, sink)) WITHOUT ROWID;

-- Facts about a stream as a whole.
CREATE TABLE stream_start (stream TEXT PRIMARY KEY, latest_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE seen_shard (
    stream TEXT NOT NULL, shard TEXT NOT NULL, PRIMARY KEY (stream, shard)) WITHOUT ROWID;

-- When a shard that was read to its end was first missing from the list of the stream.
ALTER TABLE shard ADD COLUMN gone_ms INTEGER;

-- When the last record that a sink has arrived: its lag is known before the first record is read.
ALTER TABLE sink_position ADD COLUMN arrived_ms INTEGER;

-- Where a sink stood when rows of it were given up. Empty: at the beginning of the shard, or unknown.
ALTER TABLE given_up ADD COLUMN from_sequence TEXT NOT NULL DEFAULT '';
ALTER TABLE given_up ADD COLUMN from_sub INTEGER NOT NULL DEFAULT 0;

-- Letters of an unfinished redrive are in no log. What a redrive has left for a sink that is gone, the sinks
-- that a redrive began with, and the letters whose rows a replay has brought to a sink.
DROP TRIGGER letter_written;
DROP TRIGGER letter_shown;
DROP TRIGGER letter_deleted;
CREATE TRIGGER letter_written AFTER INSERT ON dead_letter
    WHEN NEW.held = 0 AND NEW.stream NOT GLOB 'letters:*'
    BEGIN INSERT INTO letter_log (letter) VALUES (NEW.rowid); END;
CREATE TRIGGER letter_shown AFTER UPDATE OF held ON dead_letter
    WHEN NEW.held = 0 AND OLD.held <> 0 AND NEW.stream NOT GLOB 'letters:*'
    BEGIN INSERT INTO letter_log (letter) VALUES (NEW.rowid); END;
CREATE TRIGGER letter_stays AFTER UPDATE OF stream ON dead_letter
    WHEN NEW.held = 0 AND OLD.stream GLOB 'letters:*' AND NEW.stream NOT GLOB 'letters:*'
    BEGIN INSERT INTO letter_log (letter) VALUES (NEW.rowid); END;
CREATE TRIGGER letter_deleted AFTER DELETE ON dead_letter
    BEGIN
        DELETE FROM letter_log WHERE letter = OLD.rowid;
        DELETE FROM redrive WHERE letter = OLD.rowid;
        DELETE FROM letter_delivered WHERE letter = OLD.rowid;
        DELETE FROM replay_letter WHERE letter = OLD.rowid;
    END;
DELETE FROM letter_log
    WHERE letter IN (SELECT rowid FROM dead_letter WHERE stream GLOB 'letters:*');
CREATE INDEX redrive_letter ON redrive (letter);
CREATE TABLE redrive_rest (id INTEGER PRIMARY KEY);
CREATE TABLE redrive_sink (
    id INTEGER NOT NULL, sink TEXT NOT NULL, PRIMARY KEY (id, sink)) WITHOUT ROWID;
CREATE TABLE letter_delivered (
    letter INTEGER NOT NULL, sink TEXT NOT NULL, PRIMARY KEY (letter, sink)) WITHOUT ROWID;
CREATE TABLE replay (id INTEGER PRIMARY KEY, sink TEXT NOT NULL);
CREATE TABLE replay_letter (
    replay INTEGER NOT NULL, letter INTEGER NOT NULL, delivered INTEGER NOT NULL,
    PRIMARY KEY (replay, letter)) WITHOUT ROWID;
CREATE INDEX replay_letter_letter ON replay_letter (letter);
CREATE TABLE running_sink (sink TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID;
DELETE FROM ledger WHERE stream GLOB 'letters:*' AND NOT EXISTS (
    SELECT 1 FROM redrive WHERE ledger.stream GLOB 'letters:*@' || redrive.id);

-- The id of the state and the number of its durable writes, which sinks keep beside their positions. Marks of
-- other states that this one continues. Letters that a newer state may have redriven. How far a shard is read
-- once more for a sink that was restored: up to there the revision that ran first may be pruned already.
CREATE TABLE state_mark (id TEXT NOT NULL, number INTEGER NOT NULL);
INSERT INTO state_mark VALUES (lower(hex(randomblob(16))), 0);
CREATE TABLE seen_state (id TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE doubtful_letters (up_to INTEGER NOT NULL);
ALTER TABLE shard ADD COLUMN reread_to TEXT;
ALTER TABLE shard ADD COLUMN reread_to_sub INTEGER;

-- Letters apart from their records. The view has the columns of earlier versions, for people.
CREATE TABLE letter_record (
    id INTEGER PRIMARY KEY, stream TEXT NOT NULL, shard TEXT NOT NULL, sequence TEXT NOT NULL,
    sub_sequence INTEGER NOT NULL, partition_key BLOB NOT NULL, original BLOB NOT NULL,
    UNIQUE (stream, shard, sequence, sub_sequence));
CREATE TABLE letters (
    id INTEGER PRIMARY KEY, stream TEXT NOT NULL, shard TEXT NOT NULL, sequence TEXT NOT NULL,
    sub_sequence INTEGER NOT NULL, place TEXT NOT NULL, output INTEGER NOT NULL,
    held INTEGER NOT NULL, record INTEGER, entered_kind INTEGER NOT NULL,
    entered_key BLOB NOT NULL, entered BLOB NOT NULL, entered_bytes INTEGER NOT NULL,
    entered_digest TEXT NOT NULL, made TEXT NOT NULL, arrived_ms INTEGER NOT NULL,
    plugin TEXT NOT NULL, digest TEXT NOT NULL, reason TEXT NOT NULL, backtrace TEXT NOT NULL,
    written_ms INTEGER NOT NULL, route TEXT NOT NULL, kept_bytes INTEGER NOT NULL,
    UNIQUE (stream, shard, sequence, sub_sequence, place, output));
INSERT OR IGNORE INTO letter_record
    (stream, shard, sequence, sub_sequence, partition_key, original)
    SELECT stream, shard, sequence, sub_sequence, partition_key, original FROM dead_letter
    WHERE held <> 3 AND stream NOT GLOB 'letters:*' ORDER BY rowid;
INSERT INTO letters SELECT d.rowid, d.stream, d.shard, d.sequence, d.sub_sequence, d.place, d.output,
    d.held, (SELECT r.id FROM letter_record r WHERE (r.stream, r.shard, r.sequence, r.sub_sequence)
        = (d.stream, d.shard, d.sequence, d.sub_sequence) AND d.held <> 3),
    d.held <> 3 AND d.stream NOT GLOB 'letters:*' AND d.entered = d.original
        AND d.entered_key = d.partition_key,
    d.entered_key, d.entered, length(d.entered), '', '', d.arrived_ms, d.plugin, d.digest, d.reason,
    d.backtrace, d.written_ms, d.route,
    512 + length(d.entered) + length(d.entered_key) + length(d.reason) + length(d.backtrace)
    FROM dead_letter d;
UPDATE letters SET entered = x'', entered_key = x'', kept_bytes = kept_bytes - entered_bytes
    WHERE entered_kind = 1;
UPDATE letters SET record = (
    SELECT o.record FROM redrive r JOIN letters o ON o.id = r.letter
    WHERE letters.stream GLOB '*@' || r.id
        AND r.ordinal = CAST(ltrim(letters.sequence, '0') AS INTEGER))
    WHERE stream GLOB 'letters:*';
DROP TABLE dead_letter;
CREATE INDEX letters_record ON letters (record);
CREATE INDEX letters_as_digest ON letters (entered_kind) WHERE entered_kind = 2;
CREATE VIEW dead_letter AS
    SELECT l.id, l.stream, l.shard, l.sequence, l.sub_sequence, l.place, l.output, l.held,
        coalesce(r.partition_key, x'') AS partition_key, coalesce(r.original, x'') AS original,
        CASE l.entered_kind WHEN 1 THEN r.partition_key ELSE l.entered_key END AS entered_key,
        CASE l.entered_kind WHEN 1 THEN r.original ELSE l.entered END AS entered,
        l.entered_digest, l.arrived_ms, l.plugin, l.digest, l.reason, l.backtrace, l.written_ms,
        l.route
    FROM letters l LEFT JOIN letter_record r ON r.id = l.record;
CREATE TRIGGER letter_written AFTER INSERT ON letters
    WHEN NEW.held = 0 AND NEW.stream NOT GLOB 'letters:*'
    BEGIN INSERT INTO letter_log (letter) VALUES (NEW.id); END;
CREATE TRIGGER letter_shown AFTER UPDATE OF held ON letters
    WHEN NEW.held = 0 AND OLD.held <> 0 AND NEW.stream NOT GLOB 'letters:*'
    BEGIN INSERT INTO letter_log (letter) VALUES (NEW.id); END;
CREATE TRIGGER letter_stays AFTER UPDATE OF stream ON letters
    WHEN NEW.held = 0 AND OLD.stream GLOB 'letters:*' AND NEW.stream NOT GLOB 'letters:*'
    BEGIN INSERT INTO letter_log (letter) VALUES (NEW.id); END;
CREATE TABLE letter_store (bytes INTEGER NOT NULL);
INSERT INTO letter_store SELECT
    (SELECT coalesce(sum(kept_bytes), 0) FROM letters) + (SELECT
        coalesce(sum(256 + length(partition_key) + length(original)), 0) FROM letter_record);
CREATE TRIGGER letter_deleted AFTER DELETE ON letters
    BEGIN
        DELETE FROM letter_log WHERE letter = OLD.id;
        DELETE FROM redrive WHERE letter = OLD.id;
        DELETE FROM letter_delivered WHERE letter = OLD.id;
        DELETE FROM replay_letter WHERE letter = OLD.id;
        DELETE FROM letter_record WHERE id = OLD.record
            AND NOT EXISTS (SELECT 1 FROM letters WHERE record = OLD.record);
        UPDATE letter_store SET bytes = bytes - OLD.kept_bytes;
    END;
CREATE TRIGGER letter_record_left AFTER UPDATE OF record ON letters
    WHEN OLD.record IS NOT NULL AND OLD.record IS NOT NEW.record
    BEGIN DELETE FROM letter_record WHERE id = OLD.record
        AND NOT EXISTS (SELECT 1 FROM letters WHERE record = OLD.record); END;
CREATE TRIGGER letter_counted AFTER INSERT ON letters
    BEGIN UPDATE letter_store SET bytes = bytes + NEW.kept_bytes; END;
CREATE TRIGGER letter_resized AFTER UPDATE OF kept_bytes ON letters
    BEGIN UPDATE letter_store SET bytes = bytes + NEW.kept_bytes - OLD.kept_bytes; END;
CREATE TRIGGER letter_record_counted AFTER INSERT ON letter_record
    BEGIN UPDATE letter_store SET bytes =
        bytes + 256 + length(NEW.partition_key) + length(NEW.original); END;
CREATE TRIGGER letter_record_deleted AFTER DELETE ON letter_record
    BEGIN UPDATE letter_store SET bytes =
        bytes - 256 - length(OLD.partition_key) - length(OLD.original); END;

-- The letter of each record whose copy has the record whole (its carrier); 0: a letter that is gone. The record is
-- handed on when its carrier is deleted or loses it. The log has the letters that a sink may not have: it is
-- shortened up to where all sinks have them.
CREATE TABLE letter_carrier (of_record INTEGER PRIMARY KEY, carrier INTEGER NOT NULL);
INSERT INTO letter_carrier SELECT of_record, first FROM (
    SELECT l.record AS of_record, l.id AS first, min(g.number)
    FROM letter_log g JOIN letters l ON l.id = g.letter
    WHERE l.record IS NOT NULL GROUP BY l.record);
CREATE TRIGGER letter_carries AFTER INSERT ON letter_log
    BEGIN INSERT INTO letter_carrier SELECT record, id FROM letters
        WHERE id = NEW.letter AND record IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM letter_carrier WHERE of_record = record); END;
CREATE TRIGGER letter_carrier_left AFTER DELETE ON letter_record
    BEGIN DELETE FROM letter_carrier WHERE of_record = OLD.id; END;
CREATE TRIGGER letter_carrier_deleted BEFORE DELETE ON letters WHEN OLD.record IS NOT NULL BEGIN
        UPDATE letter_carrier SET carrier = 0
            WHERE of_record = OLD.record AND carrier = OLD.id
            AND NOT EXISTS (SELECT 1 FROM letter_log WHERE letter = OLD.id);
        UPDATE letter_carrier SET carrier = coalesce((
            SELECT l.id FROM letters l CROSS JOIN letter_log g ON g.letter = l.id
            WHERE l.record = OLD.record AND l.id <> OLD.id
                AND g.number > (SELECT min(number) FROM letter_log WHERE letter = OLD.id)
            ORDER BY l.id LIMIT 1), OLD.id)
            WHERE of_record = OLD.record AND carrier = OLD.id;
        DELETE FROM letter_carrier WHERE of_record = OLD.record AND carrier = OLD.id;
    END;
CREATE TRIGGER letter_carrier_marked AFTER UPDATE OF record ON letters
    WHEN OLD.record IS NOT NULL AND OLD.record IS NOT NEW.record BEGIN
        UPDATE letter_carrier SET carrier = 0
            WHERE of_record = OLD.record AND carrier = OLD.id
            AND NOT EXISTS (SELECT 1 FROM letter_log WHERE letter = OLD.id);
        UPDATE letter_carrier SET carrier = coalesce((
            SELECT l.id FROM letters l CROSS JOIN letter_log g ON g.letter = l.id
            WHERE l.record = OLD.record AND l.id <> OLD.id
                AND g.number > (SELECT min(number) FROM letter_log WHERE letter = OLD.id)
            ORDER BY l.id LIMIT 1), OLD.id)
            WHERE of_record = OLD.record AND carrier = OLD.id;
        DELETE FROM letter_carrier WHERE of_record = OLD.record AND carrier = OLD.id;
    END;

-- The keyed hash of each variable's value as a revision ran last.
CREATE TABLE variable (
    generation TEXT NOT NULL, name TEXT NOT NULL, hash TEXT NOT NULL,
    PRIMARY KEY (generation, name)) WITHOUT ROWID;
