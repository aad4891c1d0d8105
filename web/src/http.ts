/** Calls of the server: one shape of errors, the key, and streams of events. */

import { signal } from "@preact/signals";
import { remember, remembered } from "./memory";

/** The server answered, and refused. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null,
    readonly retryAfter: number | null,
  ) {
    super(message);
  }
}

/** Nobody answered, or the answer broke off. */
export class Unreachable extends Error {}

export const key = signal(remembered("key") ?? "");
key.subscribe((value) => remember("key", value || null));

/** Whether the server answered when it was last asked. */
export const reachable = signal(true);

export interface Options {
  body?: unknown;
  text?: string;
  signal?: AbortSignal;
  keepalive?: boolean;
}

async function ask(path: string, options: Options): Promise<Response> {
  const headers: Record<string, string> = {};
  if (key.value) headers["authorization"] = `Bearer ${key.value}`;
  const body = options.text ?? (options.body === undefined ? undefined : JSON.stringify(options.body));
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer: Response;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body,
      signal: options.signal,
      keepalive: options.keepalive,
      cache: "no-store",
    });
  } catch (problem) {
    if (problem instanceof DOMException && problem.name === "AbortError") throw problem;
    reachable.value = false;
    throw new Unreachable(String(problem));
  }
  reachable.value = true;
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer: Response): Promise<Refused> {
  const raw = await answer.text().catch(() => "");
  const after = Number(answer.headers.get("retry-after"));
  let message = raw.slice(0, 300) || `${answer.status} ${answer.statusText}`;
  let code: string | null = null;
  try {
    const { error } = JSON.parse(raw) as { error: { message: string; code: string | null } };
    message = error.message;
    code = error.code;
  } catch {
    // a proxy's own page: its first words have to do
  }
  return new Refused(answer.status, message, code, after > 0 ? after : null);
}

export async function call<T>(path: string, options: Options = {}): Promise<T> {
  const answer = await ask(path, options);
  return (await broken(answer.json())) as T;
}

export async function text(path: string, options: Options = {}): Promise<string> {
  return broken((await ask(path, options)).text());
}

async function broken<T>(reading: Promise<T>): Promise<T> {
  try {
    return await reading;
  } catch (problem) {
    if (problem instanceof DOMException && problem.name === "AbortError") throw problem;
    throw new Unreachable(String(problem));
  }
}

/** The data of a stream of events, until [DONE]; a stream that ends without it has broken off. */
export async function* events<T>(path: string, options: Options): AsyncGenerator<T> {
  const answer = await ask(path, options);
  const reader = answer.body!.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await broken(reader.read());
      if (done) break;
      held += decoder.decode(value, { stream: true });
      const parts = held.split("\n\n");
      held = parts.pop()!;
      for (const part of parts) {
        const data = part.startsWith("data: ") ? part.slice(6) : null;
        if (data === "[DONE]") return;
        if (data !== null) yield checked<T>(data);
      }
    }
  } catch (problem) {
    if (problem instanceof Unreachable) reachable.value = false;
    throw problem;
  } finally {
    void reader.cancel().catch(() => undefined);
  }
  throw new Unreachable("the stream broke off");
}

function checked<T>(data: string): T {
  const event = JSON.parse(data) as T & { error?: { message: string; code: string | null } };
  if (event.error) throw new Refused(500, event.error.message, event.error.code, null);
  return event;
}
