// {{name}}: greets. Accepts {"name":"Ada"}, emits {"greeting":"Hello, Ada!"} on the route "out".
import { plugin } from "shardmill";

export const stage = plugin({
  name: "{{name}}",
  version: "0.1.0",
  accepts: ["application/json"],
  routes: { out: { format: "application/json", columns: { greeting: "text" } } },

  // An error rejects the record: it becomes a dead letter with the reason. Other records are not affected.
  record(record, out) {
    const { name } = record.json();
    if (typeof name !== "string") throw new Error("expected an object with a text `name`");
    const greeting = `Hello, ${name}!`; // edit me
    out.emit("out", { greeting });
  },
});
