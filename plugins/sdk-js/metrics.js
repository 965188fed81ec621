/** The capability `metrics`. Register metrics once, in `configure`; observe values anywhere. */
import host from "shardmill:plugin/metrics";

class Metric {
  constructor(kind, name, help) {
    try {
      this._number = host.register(kind, name, help);
    } catch (refusal) {
      throw new Error(`metric ${name}: ${refusal?.message ?? refusal}`);
    }
  }

  observe(value) {
    host.observe(this._number, value);
  }
}

export const counter = (name, help = "") => new Metric("counter", name, help);
export const gauge = (name, help = "") => new Metric("gauge", name, help);
export const histogram = (name, help = "") => new Metric("histogram", name, help);
