/** What was answered, whatever its status. */
export interface Response {
  readonly status: number;
  /** Names in lower case. */
  readonly headers: { readonly [name: string]: string };
  bytes(): Uint8Array;
  text(): string;
  json(): any;
}
/** The capability `http`: sends a request to a granted host and waits for the answer. */
export function send(request: {
  readonly url: string;
  /** `GET` where it is absent. */
  readonly method?: string;
  readonly headers?: { readonly [name: string]: string };
  readonly body?: string | Uint8Array;
}): Response;
