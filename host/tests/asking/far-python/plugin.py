"""Calls the capabilities that ask other servers: lookup, http."""

from shardmill import plugin
from shardmill_http import send
from shardmill_lookup import lookup


@plugin(name="far", version="0.1.0", routes={"out": "application/json"})
class Far:
    def configure(self, config, context):
        self.url = config["url"]

    def batch(self, records, out):
        self.rows = lookup("cars", [record.text() for record in records])

    def record(self, record, out):
        out.emit("out", self.rows[record.index] or self.ask(record))

    def ask(self, record):
        name = record.text()
        url = name if name.startswith("http") else self.url + name
        headers = {"x-key": record.key}
        return send(url, method="POST", headers=headers, body=record.bytes()).json()
