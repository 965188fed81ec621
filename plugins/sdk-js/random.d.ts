/** The capability `random`: a number from 0 to below 1 that nobody can predict. */
export function random(): number;
