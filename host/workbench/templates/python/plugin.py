"""{{name}}: greets. Accepts {"name":"Ada"}, emits {"greeting":"Hello, Ada!"} on the route "out"."""

from shardmill import Out, Record, Reject, plugin


@plugin(
    name="{{name}}",
    version="0.1.0",
    accepts=["application/json"],
    routes={"out": ("application/json", {"greeting": "text"})},
)
def greet(record: Record, out: Out) -> None:
    """An exception rejects the record: it becomes a dead letter. Other records are not affected."""
    name = record.json().get("name")
    if not isinstance(name, str):
        raise Reject("expected an object with a text `name`")
    greeting = f"Hello, {name}!"  # edit me
    out.emit("out", {"greeting": greeting})
