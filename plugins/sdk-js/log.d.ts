/** The capability `log`: writes lines to the host's log. With it, `console` writes there too. */
export const log: {
  trace(...given: unknown[]): void;
  debug(...given: unknown[]): void;
  info(...given: unknown[]): void;
  warn(...given: unknown[]): void;
  error(...given: unknown[]): void;
};
