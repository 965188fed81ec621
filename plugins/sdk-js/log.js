/** The capability `log`. With it, `console` writes to the host's log too. */
import host from "shardmill:plugin/log";

const text = (given) =>
  given.map((one) => (typeof one === "string" ? one : (JSON.stringify(one) ?? String(one)))).join(" ");
const at =
  (level) =>
  (...given) =>
    host.write(level, text(given));

export const log = {
  trace: at("trace"),
  debug: at("debug"),
  info: at("info"),
  warn: at("warn"),
  error: at("error"),
};

globalThis.console = { ...log, log: log.info };
