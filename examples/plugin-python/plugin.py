"""Parses the log lines of Apache and nginx (combined log format) into typed rows."""

import re
from datetime import datetime, timezone

from shardmill import Out, Record, Reject, plugin

LINE = re.compile(
    r"(?P<client>\S+) \S+ (?P<user>\S+) \[(?P<at>[^]]+)\] "
    r'"(?P<method>[A-Z]+) (?P<path>\S+)[^"]*" (?P<status>\d{3}) (?P<bytes>\d+|-)'
    r'(?: "(?P<referrer>[^"]*)" "(?P<agent>[^"]*)")?'
)

COLUMNS = {
    "at": "timestamptz",
    "client": "text",
    "user": "text?",
    "method": "text",
    "path": "text",
    "status": "integer",
    "bytes": "bigint",
    "referrer": "text?",
    "agent": "text?",
}


@plugin(
    name="access-log-py",
    version="0.1.0",
    accepts=["text/plain"],
    routes={
        "requests": ("application/json", COLUMNS),
        "errors": ("application/json", COLUMNS),
    },
)
class AccessLog:
    def configure(self, config, context):
        self.ignored = tuple(config.get("ignore", ()))

    def record(self, record: Record, out: Out) -> None:
        line = LINE.match(record.text())
        if line is None:
            raise Reject("not a line in the combined log format")
        row = {name: None if value in ("-", "") else value for name, value in line.groupdict().items()}
        if row["path"].startswith(self.ignored):
            return
        at = datetime.strptime(row["at"], "%d/%b/%Y:%H:%M:%S %z")
        row["at"] = at.astimezone(timezone.utc)
        row["status"] = int(row["status"])
        row["bytes"] = int(row["bytes"] or 0)
        out.emit("errors" if row["status"] >= 500 else "requests", {name: row[name] for name in COLUMNS})
