/** The capability `clock`: milliseconds since the Unix epoch. */
export function nowMs(): number;
