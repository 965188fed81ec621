"""Makes `aggregates.json`: aggregates from an implementation that is not ours, with the records in them.

    pip install aws-kinesis-agg==1.2.3 six protobuf && python make.py > aggregates.json
"""

import base64
import json
import random

from aws_kinesis_agg.aggregator import RecordAggregator

random.seed(2014)


def text(data):
    return base64.b64encode(data).decode()


def user_records(count, size, keys):
    for number in range(count):
        key = f"key-{random.randrange(keys)}-ü" if number % 3 else f"key-{random.randrange(keys)}"
        # Some records have an explicit hash key, which decides their shard instead of the partition key.
        hash_key = str(random.randrange(2**128)) if number % 5 == 0 else None
        yield key, hash_key, random.randbytes(random.randrange(size))


cases = []
for count, size, keys in [(1, 10, 1), (2, 2, 1), (100, 50, 7), (500, 200, 300), (2000, 20, 3)]:
    aggregator, expected = RecordAggregator(), []
    for key, hash_key, data in user_records(count, size, keys):
        # An empty payload is valid.
        assert aggregator.add_user_record(key, data, hash_key) is None
        expected.append({"key": key, "hash_key": hash_key, "data": text(data)})
    _, _, aggregate = aggregator.clear_and_get().get_contents()
    cases.append({"aggregate": text(aggregate), "records": expected})
print(json.dumps(cases))
