/** The capability `metrics`: time series that the plugin defines. Register them once, in `configure`. */
export interface Metric {
  /** Records a value: a counter adds it, a gauge keeps it, a histogram counts it. */
  observe(value: number): void;
}
/** Registers a metric that adds up its values. The name must match `[a-z][a-z0-9_]*`. */
export function counter(name: string, help?: string): Metric;
/** Registers a metric that keeps its last value. */
export function gauge(name: string, help?: string): Metric;
/** Registers a metric that counts the distribution of its values. */
export function histogram(name: string, help?: string): Metric;
