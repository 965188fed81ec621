/** Response to a request, whatever its status. */
export interface Response {
  readonly status: number;
  /** Headers by lower-case name. */
  readonly headers: { readonly [name: string]: string };
  bytes(): Uint8Array;
  text(): string;
  json(): any;
}
/** The capability `http`: sends a request to a granted host and waits for the response. */
export function send(request: {
  readonly url: string;
  /** `GET` by default. */
  readonly method?: string;
  readonly headers?: { readonly [name: string]: string };
  readonly body?: string | Uint8Array;
}): Response;
