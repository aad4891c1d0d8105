/** Replies: asked for, streamed, stopped, continued, and what is said when one can't be had. */

import { batch, computed, signal, type Signal } from "@preact/signals";
import { call, events, key, reachable, Refused, Unreachable } from "./http";
import { add, complain, model, open, opened, path, settings, talk, update, set, keyNeeded } from "./state";
import { offered, ran } from "./tools";
import { pathOf, withCurrent } from "./tree";
import type { Conversation, Extra, Message, Sampling, Settings, Timings, ToolCall } from "./types";
import { t } from "./words";

export type Phase = "waiting" | "reading" | "writing" | "ended";

export interface Trouble {
  kind: "gone" | "queue" | "full" | "limited" | "key" | "long" | "tools" | "failed";
  words: string;
}

/** One reply while it is written, and what became of it. */
export interface Run {
  conversation: string;
  /** The message it answers, or that it continues. */
  at: string | null;
  continues: boolean;
  phase: Signal<Phase>;
  text: Signal<string>;
  thought: Signal<string>;
  calls: Signal<ToolCall[]>;
  progress: Signal<{ total: number; processed: number } | null>;
  timings: Signal<Timings | null>;
  firstTokenMs: Signal<number | null>;
  trouble: Signal<Trouble | null>;
  /** The message it became; null before its first word. */
  message: Signal<Message | null>;
  abort: AbortController;
}

/** By conversation: the reply that is written, or the one that failed and may be tried again. */
export const runs = signal<ReadonlyMap<string, Run>>(new Map());
export const run = computed(() => runs.value.get(talk.value?.conversation.id ?? "") ?? null);
export const busy = computed(() => run.value !== null && run.value.phase.value !== "ended");
/** Conversations whose oldest messages are left out where they no longer fit. */
const fitted = new Set<string>();

const SAVE_MS = 2000;
const REPLY_ROOM = 256;
const MOST_WAITS = 20;

// ---------------------------------------------------------------------------------------------------------- asking

/** Keeps the question, then asks. Throws what the server said where it could not be kept. */
export async function ask(question: string): Promise<void> {
  const conversation = await opened();
  const leaf = talk.value!.conversation.current;
  const message = await add(conversation.id, leaf, "user", question);
  void reply(conversation.id, message.id);
}

/** The same question in other words, beside the old one. */
export async function askInstead(old: Message, question: string): Promise<void> {
  const { id } = talk.value!.conversation;
  const message = await add(id, old.parent, old.role, question, old.role === "assistant" ? { ...old.extra, edited: true } : {});
  if (message.role === "user") void reply(id, message.id);
}

/** Another reply beside this one. */
export function regenerate(message: Message): void {
  const shown = talk.value!;
  talk.value = withCurrent(shown, message.parent);
  void reply(shown.conversation.id, message.parent);
}

/** The reply goes on where it ended. */
export function goOn(message: Message): void {
  void reply(talk.value!.conversation.id, message.id, message);
}

export function again(): void {
  const last = run.value;
  if (!last) return;
  void reply(last.conversation, last.at, last.continues ? (last.message.value ?? undefined) : undefined);
}

/** The same without the oldest messages, from now on. */
export function fitAndAsk(): void {
  const last = run.value;
  if (!last) return;
  fitted.add(last.conversation);
  again();
}

export function stop(): void {
  run.value?.abort.abort();
}

/** Results of the calls of a message become messages; with the last of them the reply goes on. */
export async function answerCall(message: Message, toolCall: ToolCall, result: string): Promise<void> {
  const { id } = talk.value!.conversation;
  const leaf = talk.value!.conversation.current ?? message.id;
  const extra = { tool_call_id: toolCall.id, name: toolCall.function.name };
  try {
    const made = await add(id, leaf, "tool", result, extra);
    const answered = new Set(path.value.map((one) => one.extra.tool_call_id));
    if (message.extra.tool_calls?.every((one) => answered.has(one.id))) void reply(id, made.id);
  } catch (problem) {
    complain(problem);
  }
}

export function runCall(message: Message, toolCall: ToolCall): void {
  const result = ran(toolCall.function.name, toolCall.function.arguments);
  if (result !== null) void answerCall(message, toolCall, result);
}

// ---------------------------------------------------------------------------------------------------------- streaming

interface Chunk {
  choices: {
    delta: {
      content?: string | null;
      reasoning_content?: string;
      tool_calls?: { index: number; id?: string; function: { name?: string; arguments: string } }[];
    };
    finish_reason: string | null;
  }[];
  usage?: { prompt_tokens: number; completion_tokens: number } | null;
  prompt_progress?: { total: number; processed: number };
  timings?: Timings;
}

function newRun(conversation: string, at: string | null, continued?: Message): Run {
  return {
    conversation,
    at,
    continues: continued !== undefined,
    phase: signal<Phase>("waiting"),
    text: signal(continued?.content ?? ""),
    thought: signal(continued?.extra.reasoning_content ?? ""),
    calls: signal<ToolCall[]>([]),
    progress: signal(null),
    timings: signal(null),
    firstTokenMs: signal(null),
    trouble: signal(null),
    message: signal(continued ?? null),
    abort: new AbortController(),
  };
}

async function reply(conversation: string, at: string | null, continued?: Message): Promise<void> {
  if (runs.value.get(conversation)?.phase.value === "writing") return;
  const shown = talk.value;
  if (shown?.conversation.id !== conversation) return;
  const one = newRun(conversation, at, continued);
  runs.value = new Map(runs.value).set(conversation, one);
  const had = pathOf(shown, at);
  const keeping = new Keeper(one, shown.conversation, continued);
  try {
    await stream(one, had, shown.conversation.settings, keeping);
  } catch (problem) {
    if (problem instanceof DOMException && problem.name === "AbortError") keeping.finish("cancelled");
    else {
      one.trouble.value = troubleOf(problem);
      keeping.finish("error");
    }
  } finally {
    one.phase.value = "ended";
    await keeping.close();
    if (!one.trouble.value) {
      const left = new Map(runs.value);
      if (left.get(conversation) === one) left.delete(conversation);
      runs.value = left;
    }
  }
}

async function stream(one: Run, had: Message[], chosen: Settings, keeping: Keeper): Promise<void> {
  const began = performance.now();
  const told = await toldOf(one, had, chosen, keeping);
  const tools = toolsOf(chosen);
  const required = tools.length > 0 && chosen.tools?.required && had.at(-1)?.role !== "tool" && !one.continues;
  const { max_new_tokens, ...sampling } = chosen.sampling ?? {};
  const body = {
    messages: told,
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
    timings_per_token: true,
    ...(tools.length ? { tools, tool_choice: required ? "required" : "auto" } : {}),
    ...(one.continues ? { continue_final_message: true, add_generation_prompt: false } : {}),
    ...sampling,
    ...(max_new_tokens === undefined ? {} : { max_tokens: max_new_tokens }),
  };
  for await (const chunk of patiently(one, body)) {
    batch(() => {
      if (chunk.timings) one.timings.value = chunk.timings;
      if (chunk.usage) keeping.tokens = { prompt: chunk.usage.prompt_tokens, completion: chunk.usage.completion_tokens };
      if (chunk.prompt_progress) {
        one.progress.value = chunk.prompt_progress;
        if (one.phase.value === "waiting") one.phase.value = "reading";
      }
      const choice = chunk.choices[0];
      if (!choice) return;
      const { content, reasoning_content: thought, tool_calls: calls } = choice.delta;
      if (content || thought || calls) {
        one.firstTokenMs.value ??= performance.now() - began;
        one.phase.value = "writing";
      }
      if (content) one.text.value += content;
      if (thought) one.thought.value += thought;
      if (calls) one.calls.value = withCalls(one.calls.value, calls);
      if (choice.finish_reason) keeping.finish(choice.finish_reason);
    });
    if (one.phase.value === "writing") keeping.soon();
  }
}

/** The events of a reply; where the server has no room now, it is asked again when it said. */
async function* patiently(one: Run, body: object): AsyncGenerator<Chunk> {
  for (let waits = 0; ; waits++) {
    try {
      yield* events<Chunk>("/v1/chat/completions", { body, signal: one.abort.signal });
      return;
    } catch (problem) {
      const busyNow = problem instanceof Refused && problem.status === 503 && problem.retryAfter !== null;
      if (!busyNow || waits >= MOST_WAITS || one.phase.value !== "waiting") throw problem;
      one.trouble.value = { kind: "queue", words: t("queueMore", { n: problem.retryAfter! }) };
      await pause(problem.retryAfter! * 1000, one.abort.signal);
      one.trouble.value = null;
    }
  }
}

function pause(ms: number, abort: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    abort.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}

function withCalls(known: ToolCall[], pieces: NonNullable<Chunk["choices"][0]["delta"]["tool_calls"]>): ToolCall[] {
  const calls = known.map((one) => ({ ...one, function: { ...one.function } }));
  for (const piece of pieces) {
    calls[piece.index] ??= { id: piece.id ?? "", type: "function", function: { name: piece.function.name ?? "", arguments: "" } };
    calls[piece.index].function.arguments += piece.function.arguments;
  }
  return calls;
}

function toolsOf(chosen: Settings): ReturnType<typeof offered> {
  try {
    return offered(chosen.tools);
  } catch (problem) {
    throw new BadTools(t("badTools", { why: problem instanceof Error ? problem.message : "" }));
  }
}

class BadTools extends Error {}

// ---------------------------------------------------------------------------------------------------------- what is told

type Told = Record<string, unknown> & { role: string };

function told(message: Message): Told {
  const { tool_calls, tool_call_id, reasoning_content } = message.extra;
  return {
    role: message.role,
    content: message.content,
    ...(tool_calls?.length ? { tool_calls } : {}),
    ...(tool_call_id ? { tool_call_id } : {}),
    ...(reasoning_content ? { reasoning_content } : {}),
  };
}

async function toldOf(one: Run, had: Message[], chosen: Settings, keeping: Keeper): Promise<Told[]> {
  const system: Told[] = chosen.system === undefined ? [] : [{ role: "system", content: chosen.system }];
  const all = had.filter((message) => message.role !== "system" || chosen.system === undefined).map(told);
  if (!fitted.has(one.conversation)) return [...system, ...all];
  const dropped = await fewestToDrop(one, system, all);
  keeping.dropped = dropped;
  return [...system, ...all.slice(dropped)];
}

/** How many of the oldest messages have to go until the rest and a reply fit: found by halving, so few are counted. */
async function fewestToDrop(one: Run, system: Told[], all: Told[]): Promise<number> {
  const begins = all.flatMap((message, place) => (message.role === "user" ? [place] : []));
  const fits = async (from: number): Promise<boolean> => {
    const messages = [...system, ...all.slice(from)];
    const counted = await call<{ count: number; max_model_len: number }>("/tokenize", {
      body: { messages, add_generation_prompt: !one.continues },
      signal: one.abort.signal,
    });
    return counted.count + Math.min(REPLY_ROOM, counted.max_model_len / 4) <= counted.max_model_len;
  };
  let low = 0;
  let high = begins.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (await fits(begins[middle])) high = middle;
    else low = middle + 1;
  }
  return begins[low] ?? 0;
}

// ---------------------------------------------------------------------------------------------------------- keeping

/** Replies that the server did not take because it was gone. */
const unsaved = new Set<Keeper>();

reachable.subscribe((back) => {
  if (!back) return;
  const waiting = [...unsaved];
  unsaved.clear();
  // not from within the call that found the server
  setTimeout(() => waiting.forEach((keeper) => keeper.retry()));
});

addEventListener("beforeunload", (event) => {
  if (unsaved.size) event.preventDefault();
});

/** Writes a reply to the history: when its first word comes, every two seconds, and at its end. */
class Keeper {
  tokens: { prompt: number; completion: number } | null = null;
  dropped = 0;
  private reason: string | null = null;
  private timer = 0;
  private writing: Promise<void> = Promise.resolve();
  private complained = false;
  private readonly leave = () => this.write(true);

  constructor(
    private readonly one: Run,
    private readonly conversation: Conversation,
    private readonly continued: Message | undefined,
  ) {
    addEventListener("pagehide", this.leave);
  }

  soon(): void {
    if (this.one.message.value === null) this.write();
    else this.timer ||= window.setTimeout(() => this.write(), SAVE_MS);
  }

  finish(reason: string): void {
    this.reason = reason;
  }

  async close(): Promise<void> {
    removeEventListener("pagehide", this.leave);
    clearTimeout(this.timer);
    this.timer = 0;
    const { text, thought, calls, message } = this.one;
    if (text.value || thought.value || calls.value.length || message.value) this.write();
    else if (this.reason && this.reason !== "cancelled" && this.reason !== "error") this.write(); // a reply of nothing
    await this.writing;
  }

  /** Once more, for the server is back. */
  retry(): void {
    this.complained = false;
    this.write();
  }

  private extra(): Extra {
    const { thought, calls, timings, firstTokenMs } = this.one;
    const before = this.continued?.extra ?? {};
    const cut = this.reason === "stop" || this.reason === "tool_calls" ? undefined : (this.reason ?? "error");
    const extra: Extra = {
      ...before,
      model: model.value?.name,
      sampling: inForce(this.conversation.settings.sampling),
      finish_reason: cut,
      reasoning_content: thought.value || undefined,
      tool_calls: calls.value.length ? calls.value : undefined,
      timings: timings.value ?? undefined,
      tokens: this.tokens ?? undefined,
      first_token_ms: firstTokenMs.value === null ? undefined : Math.round(firstTokenMs.value),
      dropped: this.dropped || undefined,
    };
    return JSON.parse(JSON.stringify(extra)) as Extra; // without what is undefined
  }

  private write(last = false): void {
    this.timer = 0;
    const { id } = this.conversation;
    // one after the other: the message has to be there before it is changed
    this.writing = this.writing
      .then(async () => {
        const { text, message, at } = this.one;
        if (message.value === null) {
          message.value = await add(id, at, "assistant", text.value, this.extra());
        } else {
          message.value = { ...message.value, content: text.value, extra: this.extra() };
          await update(id, message.value, last);
        }
      })
      .catch((problem: unknown) => {
        if (problem instanceof Unreachable) unsaved.add(this);
        if (this.complained) return;
        this.complained = true;
        complain(problem);
      });
  }
}

// ---------------------------------------------------------------------------------------------------------- in force

/** What the next reply is drawn with: chosen values, and the model's own for the others. */
export function inForce(chosen: Sampling = {}): Sampling {
  const facts = model.value;
  if (!facts) return chosen;
  const cut = chosen.top_p !== undefined || chosen.top_k !== undefined || chosen.min_p !== undefined;
  const temperature = cut ? facts.temperature_if_cut : facts.sampling.temperature;
  const own = { ...facts.sampling, temperature, max_new_tokens: facts.sampling.max_new_tokens ?? undefined };
  return { ...own, ...chosen };
}

/** Tokens that the conversation takes, as the server counted them last. */
export const usedTokens = computed<number>(() => {
  const one = run.value;
  if (one && one.phase.value !== "ended") {
    const timings = one.timings.value;
    const prompt = one.progress.value?.total ?? (timings ? (timings.cache_n ?? 0) + (timings.prompt_n ?? 0) : 0);
    if (prompt) return prompt + (timings?.predicted_n ?? 0);
  }
  const counted = path.value.findLast((message) => message.extra.tokens)?.extra.tokens;
  return counted ? counted.prompt + counted.completion : 0;
});

// ---------------------------------------------------------------------------------------------------------- trouble

function troubleOf(problem: unknown): Trouble {
  if (problem instanceof Unreachable) return { kind: "gone", words: problem.message };
  if (problem instanceof BadTools) return { kind: "tools", words: problem.message };
  if (!(problem instanceof Refused)) return { kind: "failed", words: String(problem) };
  const words = problem.message;
  if (problem.code === "context_length_exceeded") return { kind: "full", words };
  if (problem.status === 401) {
    keyNeeded.value = true;
    key.value = "";
    return { kind: "key", words };
  }
  if (problem.status === 413) return { kind: "long", words };
  if (problem.status === 429) return { kind: "limited", words };
  if (problem.status === 503) return { kind: "queue", words };
  return { kind: "failed", words };
}

/** The question that does not fit, in a conversation of its own. */
export async function startWith(question: string): Promise<void> {
  const chosen = settings.value;
  await open(null);
  set(chosen);
  await ask(question);
}
