//! Reading: calls without an answer, starts, lineage, and who reads.
