SELECT l.id, l.reason, r.original
FROM letters l JOIN (
    SELECT DISTINCT stream, shard, sequence, sub_sequence, original
    FROM letters WHERE original ->> 'sha256' IS NULL
) r USING (stream, shard, sequence, sub_sequence)
