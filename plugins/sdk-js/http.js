/** The capability `http`. */
import host from "shardmill:plugin/http";
import { answerOf, decodeText, encodeText } from "shardmill";

/** Sends a request and waits for the response. A status such as 500 is not an error. */
export function send({ method = "GET", url, headers = {}, body = "" }) {
  const request = {
    method,
    url,
    headers: Object.entries(headers),
    body: typeof body === "string" ? encodeText(body) : body,
  };
  const { status, headers: answered, body: bytes } = answerOf(() => host.send(request));
  return {
    status,
    headers: Object.fromEntries(answered),
    bytes: () => bytes,
    text: () => decodeText(bytes),
    json: () => JSON.parse(decodeText(bytes)),
  };
}
