//! Objects, SQLite and HTTP: odd rows, answers and files that break off.
