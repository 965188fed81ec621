-- Version 5, from 4: what runs in place of what the files say, and every change.

CREATE TABLE running (declared TEXT NOT NULL, running TEXT NOT NULL);
CREATE TABLE change (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, kind TEXT NOT NULL,
    stage TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL, outcome TEXT NOT NULL,
    reason TEXT NOT NULL);
CREATE INDEX change_stage ON change (stage, number);
