// {{name}}: greets. Takes {"name":"Ada"}, gives {"greeting":"Hello, Ada!"} on the route "out".
import { plugin } from "shardmill";

export const stage = plugin({
  name: "{{name}}",
  version: "0.1.0",
  accepts: ["application/json"],
  routes: { out: { format: "application/json", columns: { greeting: "text" } } },

  // An error rejects the record: it is kept with the reason, and its neighbours go on.
  record(record, out) {
    const { name } = record.json();
    if (typeof name !== "string") throw new Error("an object with a text `name` was due");
    const greeting = `Hello, ${name}!`; // edit me
    out.emit("out", { greeting });
  },
});
