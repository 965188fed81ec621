/** The capability `random`: returns an unpredictable number, at least 0 and less than 1. */
export function random(): number;
