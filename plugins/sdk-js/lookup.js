/** The capability `lookup`. */
import host from "shardmill:plugin/lookup";
import { answerOf, decodeText, encodeText } from "shardmill";

/** Rows of the table `name` in the order of the keys; undefined for a key without a row. */
export function lookup(name, keys) {
  const texts = keys.map((key) => encodeText(String(key)));
  const arena = new Uint8Array(texts.reduce((sum, text) => sum + text.length, 0));
  const words = [];
  let used = 0;
  for (const text of texts) {
    arena.set(text, used);
    words.push(used, text.length);
    used += text.length;
  }
  const found = answerOf(() => host.get(name, arena, words));
  return keys.map((_, index) => {
    const start = found.rows[2 * index] >>> 0;
    if (start === 0xffff_ffff) return undefined;
    return JSON.parse(decodeText(found.arena.subarray(start, start + found.rows[2 * index + 1])));
  });
}
