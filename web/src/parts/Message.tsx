import { effect, useSignal, type ReadonlySignal } from "@preact/signals";
import { memo } from "preact/compat";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { LiveText, show } from "../live";
import { askInstead, busy, goOn, regenerate, type Run } from "../replies";
import { complain, select, talk } from "../state";
import type { Message, ToolCall } from "../types";
import { bytes, count, language, t } from "../words";
import { Calls } from "./Calls";
import { Icon, IconButton } from "./Icon";

// what a person wrote is shown up to here until all of it is asked for
const LONG = 4_000;

interface Props {
  message: Message;
  /** Where it stands beside its siblings. */
  place: number;
  places: number;
  last: boolean;
  run: Run | null;
  results: ReadonlyMap<string, string>;
}

export const MessageRow = memo(
  Row,
  (old, now) =>
    old.message === now.message && old.place === now.place && old.places === now.places && old.last === now.last &&
    old.run === now.run && sameResults(old, now),
); // prettier-ignore

function sameResults(old: Props, now: Props): boolean {
  const calls = now.message.extra.tool_calls ?? [];
  return calls.every((one) => old.results.get(one.id) === now.results.get(one.id));
}

function Row({ message, place, places, last, run, results }: Props) {
  const editing = useSignal(false);
  const mine = message.role === "user";
  const live = run !== null;
  return (
    <article class={`row ${message.role}`} data-role={message.role} id={message.id} aria-label={mine ? t("you") : t("assistant")}>
      {editing.value ? (
        <Editor message={message} onDone={() => (editing.value = false)} />
      ) : mine ? (
        <Written text={message.content} />
      ) : (
        <>
          {message.extra.dropped ? <p class="aside">{t("dropped", { n: message.extra.dropped })}</p> : null}
          {live ? <LiveReply run={run} /> : <Reply message={message} results={results} last={last} />}
        </>
      )}
      {!live && !editing.value && (
        <footer class="actions">
          <Ending message={message} />
          <CopyButton text={message.content} />
          <IconButton icon="edit" label={t("edit")} onClick={() => (editing.value = true)} action="edit" />
          {!mine && <IconButton icon="again" label={t("regenerate")} disabled={busy.value} onClick={() => regenerate(message)} />}
          {!mine && last && !message.extra.tool_calls?.length && (
            <IconButton icon="play" label={t("goOn")} disabled={busy.value} onClick={() => goOn(message)} />
          )}
          {places > 1 && <Branches message={message} place={place} places={places} />}
          {!mine && <Stats message={message} />}
        </footer>
      )}
    </article>
  );
}

function Written({ text }: { text: string }) {
  const whole = useSignal(text.length <= LONG);
  return (
    <div class="bubble">
      <div class="plain">{whole.value ? text : `${text.slice(0, LONG)}…`}</div>
      {text.length > LONG && (
        <button type="button" class="link" onClick={() => (whole.value = !whole.value)}>
          {whole.value ? t("showLess") : t("showAll", { size: bytes(text.length) })}
        </button>
      )}
    </div>
  );
}

function Reply({ message, results, last }: { message: Message; results: ReadonlyMap<string, string>; last: boolean }) {
  const host = useRef<HTMLDivElement>(null);
  const words = language.value; // the buttons inside are in it, too
  useLayoutEffect(() => show(host.current!, message.content), [message.content, words]);
  return (
    <>
      {message.extra.reasoning_content && <Thought text={message.extra.reasoning_content} />}
      <div class="prose" ref={host} />
      {message.extra.tool_calls && <Calls message={message} calls={message.extra.tool_calls} results={results} open={last} />}
    </>
  );
}

/** A reply that is being written: what changes goes past the components, straight to its elements. */
export function LiveReply({ run }: { run: Run }) {
  const host = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const live = new LiveText(host.current!);
    const end = effect(() => live.set(run.text.value));
    return () => {
      end();
      live.stop();
    };
  }, [run]);
  return (
    <>
      <LiveThought thought={run.thought} />
      <div class="prose live" ref={host} />
      {run.calls.value.map((one) => (
        <CallHead key={one.id} one={one} />
      ))}
    </>
  );
}

function LiveThought({ thought }: { thought: ReadonlySignal<string> }) {
  return thought.value ? <Thought text={thought.value} open /> : null;
}

function Thought({ text, open }: { text: string; open?: boolean }) {
  return (
    <details class="thought" open={open}>
      <summary>{t("thought")}</summary>
      <p class="plain">{text}</p>
    </details>
  );
}

export function CallHead({ one }: { one: ToolCall }) {
  return (
    <div class="call">
      <div class="call-head">
        <Icon name="tool" />
        <strong>{one.function.name}</strong>
        <code class="call-arguments">{one.function.arguments}</code>
      </div>
    </div>
  );
}

function Ending({ message }: { message: Message }) {
  const reason = message.extra.finish_reason;
  if (message.role !== "assistant" || !reason) return null;
  const words = reason === "cancelled" ? t("stopped") : reason === "length" ? t("cut") : t("lost");
  return <span class="ending">{words}</span>;
}

function CopyButton({ text }: { text: string }) {
  const done = useSignal(false);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      done.value = true;
      setTimeout(() => (done.value = false), 1500);
    } catch (problem) {
      complain(problem, "");
    }
  };
  return <IconButton icon={done.value ? "check" : "copy"} label={done.value ? t("copied") : t("copy")} onClick={() => void copy()} />;
}

function Branches({ message, place, places }: { message: Message; place: number; places: number }) {
  const go = (to: number) => {
    const beside = talk.value?.kids.get(message.parent);
    if (beside?.[to]) void select(beside[to]);
  };
  return (
    <span class="branches" role="group" aria-label={t("branch", { at: place + 1, all: places })}>
      <IconButton icon="left" label={t("previous")} disabled={place === 0 || busy.value} onClick={() => go(place - 1)} />
      <span aria-hidden="true">
        {place + 1}/{places}
      </span>
      <IconButton icon="right" label={t("next")} disabled={place === places - 1 || busy.value} onClick={() => go(place + 1)} />
    </span>
  );
}

function Stats({ message }: { message: Message }) {
  const { timings, tokens, first_token_ms: first, sampling, model } = message.extra;
  const parts: string[] = [];
  if (tokens) parts.push(t("tokens", { n: count(tokens.completion) }));
  if (timings?.predicted_per_second) parts.push(t("perSecond", { n: timings.predicted_per_second.toFixed(1) }));
  if (first !== undefined) parts.push(t("firstToken", { n: (first / 1000).toFixed(2) }));
  if (!parts.length) return null;
  const more = [model, tokens && t("promptTokens", { n: count(tokens.prompt), cached: count(timings?.cache_n ?? 0) })];
  if (sampling) more.push(...Object.entries(sampling).map(([name, value]) => `${name} ${String(value)}`));
  return (
    <span class="stats" title={more.filter(Boolean).join("\n")}>
      {parts.join(" · ")}
    </span>
  );
}

function Editor({ message, onDone }: { message: Message; onDone: () => void }) {
  const field = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    const { current } = field;
    current!.value = message.content;
    current!.focus();
    current!.setSelectionRange(message.content.length, message.content.length);
  }, []);
  const send = async () => {
    const text = field.current!.value;
    if (!text.trim()) return;
    try {
      await askInstead(message, text);
      onDone();
    } catch (problem) {
      complain(problem); // the field stays, with what was typed
    }
  };
  return (
    <div class="editor">
      <textarea
        ref={field}
        aria-label={t("editing")}
        rows={3}
        onKeyDown={(event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            onDone();
          }
          if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) void send();
        }}
      />
      <div class="dialog-foot">
        <button type="button" onClick={onDone}>{t("cancel")}</button>
        <button type="button" class="primary" disabled={busy.value} onClick={() => void send()}>
          {message.role === "user" ? t("sendAgain") : t("saveBranch")}
        </button>
      </div>
    </div>
  );
}

