/** The capability `metrics`: series of the plugin's own. Announce them in `configure`, once. */
export interface Metric {
  /** Gives it a value. */
  observe(value: number): void;
}
/** A metric that adds up. The name is `[a-z][a-z0-9_]*`. */
export function counter(name: string, help?: string): Metric;
/** A metric that keeps its last value. */
export function gauge(name: string, help?: string): Metric;
/** A metric that counts how values are distributed. */
export function histogram(name: string, help?: string): Metric;
